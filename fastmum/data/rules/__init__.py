"""How sequences are formed: pure functions of what a data set says about its frames."""

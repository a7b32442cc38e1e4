"""Rules that form sequences: pure functions of what a data set says about its frames."""

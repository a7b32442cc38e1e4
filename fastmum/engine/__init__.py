"""What the training loop in `fastmum.train` is made of."""

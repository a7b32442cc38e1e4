"""What fastmum is compared with: the released model and its training step in plain PyTorch, sharing no code with it."""

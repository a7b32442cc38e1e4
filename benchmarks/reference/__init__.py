"""The reference that fastmum is compared with: the released model, its step and its data pipeline in plain PyTorch."""

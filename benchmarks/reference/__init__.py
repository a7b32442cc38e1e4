"""What fastmum is compared with: the released model, its step and its data pipeline in plain code of their own."""

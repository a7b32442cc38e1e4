"""What the figures are compared with: plain code that shares nothing with fastmum."""

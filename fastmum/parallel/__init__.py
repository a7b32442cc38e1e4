"""Several devices: who is there, how weights are shared out, how gradients are summed, and who has died."""

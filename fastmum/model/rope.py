"""Two-dimensional axial rotary position encoding, as in the released model.

A patch in row i of h, column j of w has the coordinates 2(i + 0.5)/h - 1 and 2(j + 0.5)/w - 1. Each is turned
into angles 2 pi * coordinate / period with the periods base**(2k / (d/2)), k < d/4, d the width of a head. The
d/4 row angles and d/4 column angles stand side by side, twice, so that channel c is rotated with channel c + d/2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BASE = 100.0  # released configuration


class AxialRope(nn.Module):
    """Holds the periods (a buffer of the checkpoint) and makes the tables of sines and cosines from them."""

    periods: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.register_buffer("periods", torch.empty(head_dim // 4, dtype=torch.float32))

    def init_weights(self) -> None:
        """Set the periods to base**(2k / (d/2))."""
        exponent = 2 * torch.arange(self.head_dim // 4, device=self.periods.device) / (self.head_dim // 2)
        self.periods.copy_(BASE**exponent)

    def tables(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Sines and cosines of every patch position.

        Returns:
            sin, cos: (rows * columns, head_dim) each, in the dtype of the periods (float32), patches row by row.
        """
        dtype, device = self.periods.dtype, self.periods.device
        y = (torch.arange(rows, dtype=dtype, device=device) + 0.5) / rows * 2 - 1
        x = (torch.arange(columns, dtype=dtype, device=device) + 0.5) / columns * 2 - 1
        coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
        angles = 2 * math.pi * coords[:, :, None] / self.periods  # (N, 2, d/4)
        angles = angles.flatten(1).tile(2)  # (N, d)
        return angles.sin(), angles.cos()

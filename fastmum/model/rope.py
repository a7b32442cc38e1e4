"""Two-dimensional axial rotary position encoding, as in the released model.

A patch in row i of h, column j of w has the coordinates 2(i + 0.5)/h - 1 and 2(j + 0.5)/w - 1. Each is turned
into angles 2 pi * coordinate / period with the periods base**(2k / (d/2)), k < d/4, d the width of a head. The d/4
row angles are followed by the d/4 column angles, and both are repeated: channel c is rotated with channel c + d/2.

The released encoder without its decoder computes positions in bfloat16, from the periods to the rotated q and k; with
its decoder, in float32. The dtype of the periods selects one: `rope.to(torch.bfloat16)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BASE = 100.0  # released configuration


class AxialRope(nn.Module):
    """The periods (a buffer of the checkpoint), and tables of sines and cosines."""

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
        """Sines and cosines of all patches, row by row, (rows * columns, head_dim) in the periods' dtype."""
        dtype, device = self.periods.dtype, self.periods.device
        y = torch.arange(0.5, rows, dtype=dtype, device=device) / rows * 2 - 1
        x = torch.arange(0.5, columns, dtype=dtype, device=device) / columns * 2 - 1
        coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
        angles = 2 * math.pi * coords[:, :, None] / self.periods  # (N, 2, d/4)
        angles = angles.flatten(1).tile(2)  # (N, d)
        return angles.sin(), angles.cos()


def rotate_rounded(qkv: Tensor, positions: Tensor, sin: Tensor, cos: Tensor, num_heads: int, parts: str) -> Tensor:
    """`rope_qk` with q and k, both products and their sum rounded to the dtype of the tables; v is unchanged.

    Args:
        qkv, positions, num_heads, parts: as in `fastmum.kernels.rope_qk`, with special "keep".
        sin, cos: (N, d) tables.

    Returns:
        A new tensor like `qkv`.
    """
    heads = qkv.unflatten(1, (-1, sin.shape[1]))
    turned, rest = heads.tensor_split([num_heads * len(parts.removesuffix("v"))], dim=1)
    # Position -1 takes the last row: no rotation.
    sin, cos = torch.cat([sin, sin.new_zeros(1, sin.shape[1])]), torch.cat([cos, cos.new_ones(1, cos.shape[1])])
    sin, cos = (table[positions][:, None] for table in (sin, cos))
    turned = turned.to(sin.dtype)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(qkv.dtype), rest], dim=1).flatten(1)

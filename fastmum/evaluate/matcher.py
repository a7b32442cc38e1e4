"""The kernel nearest-neighbour matcher: from features or attention to a warp.

RoMa's coarse matcher with an exponential cosine kernel. The warp is the softmax-weighted mean of the best patch and its
four neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.geometry.warp import grid_points

TEMPERATURE = 0.1  # of the exponential cosine kernel; RoMa's Gaussian process has 0.2
TAPS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # (row, column) offsets: the best patch and its neighbours


def cosine_logits(a: Tensor, b: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Cosine similarity over the temperature: (..., P_a, D) and (..., P_b, D) -> (..., P_a, P_b)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT / temperature


def decode(logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """Warp from logits (..., P_a, P_b) over the patches of B, which lie row by row in a grid (rows, columns).

    Returns:
        (..., P_a, 2) unit coordinates in B, in the dtype of the logits.
    """
    rows, columns = grid
    best = logits.argmax(-1)
    shifts = torch.tensor(TAPS, device=logits.device)
    row, column = best[..., None] // columns + shifts[:, 0], best[..., None] % columns + shifts[:, 1]
    outside = (row < 0) | (row >= rows) | (column < 0) | (column >= columns)
    taps = row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)
    weights = logits.gather(-1, taps).masked_fill(outside, -torch.inf).softmax(-1)
    return (weights[..., None] * grid_points(rows, columns).to(logits)[taps]).sum(-2)


def nearest_patch(points: Tensor, grid: tuple[int, int]) -> Tensor:
    """Index of the patch that contains each point (..., 2), int64; points outside are clamped to the border."""
    rows, columns = grid
    sides = torch.tensor([columns, rows], device=points.device)
    cell = (points * sides).floor().long().clamp(min=0).minimum(sides - 1)
    return cell[..., 1] * columns + cell[..., 0]

"""Dense warps: the true one from depth and pose, finer ones from coarse ones, and pictures moved along them.

Points are unit coordinates, (x, y) with (0, 0) the upper left corner of a picture and (1, 1) the lower right one (see
`Camera`). A warp gives for every point of picture A the place in picture B that shows the same point of the scene.

Legend: N points, h w a coarse grid, H W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.evaluate.pairs import Camera, Pair

MAX_DEPTH_ERROR = 0.05  # |z_b - z| / z_b that still counts as the same surface: RoMa's `get_gt_warp`
KNOWN = 0.5  # least share of a bilinear sample's weight that is on known depth


class Warp(NamedTuple):
    """Where points of A are in B.

    Args:
        points: (N, 2) float64, meaningless where not visible.
        visible: (N,) bool.
    """

    points: Tensor
    visible: Tensor


def grid_points(rows: int, columns: int) -> Tensor:
    """Centres of the cells of a grid, row by row, (rows * columns, 2) float64."""
    y = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1)


def true_warp(points: Tensor, a: Camera, b: Camera, T_b_a: Tensor) -> Warp:
    """The warp by geometry (RoMa's `get_gt_warp`): depth of A at the points, to the scene, into B.

    A point is visible where depth of A is known, it lies in front of B and inside of B's picture, and B's depth there
    is the point's own within 5 %. Depth is sampled bilinearly; unknown values have no part in the mean, instead of
    drawing it towards 0.

    Args:
        points: (N, 2) in A.
        a, b: the cameras.
        T_b_a: (4, 4) float64, camera A to camera B.
    """
    K_a, K_b = torch.from_numpy(a.K), torch.from_numpy(b.K)
    depth, known = _sample_depth(a, points)
    rays = torch.cat([points, torch.ones_like(points[:, :1])], 1) @ torch.linalg.inv(K_a).T
    in_b = (rays * depth[:, None]) @ T_b_a[:3, :3].T + T_b_a[:3, 3]
    z = in_b[:, 2]
    ahead = known & (z > 0)
    projected = in_b @ K_b.T
    landed = projected[:, :2] / torch.where(ahead, projected[:, 2], 1.0)[:, None]
    inside = ((landed >= 0) & (landed < 1)).all(1)
    z_b, known_b = _sample_depth(b, landed)
    same = (z_b - z).abs() < MAX_DEPTH_ERROR * z_b
    return Warp(landed, ahead & inside & known_b & same)


def pair_warp(pair: Pair, rows: int, columns: int) -> Warp:
    """The true warp of a pair at the centres of a grid on its first picture.

    Raises:
        DataError: a camera that cannot be read.
    """
    T_b_a = torch.from_numpy(pair.T_b_a)
    return true_warp(grid_points(rows, columns), pair.a.read_camera(), pair.b.read_camera(), T_b_a)


def _sample_depth(camera: Camera, points: Tensor) -> tuple[Tensor, Tensor]:
    """Depth at points (N,) float64, and whether it is known there."""
    depth = torch.from_numpy(camera.depth).double()
    weighted, known = _sample(torch.stack([depth, (depth > 0).double()]), points[None])[:, 0]
    return weighted / known.clamp(min=KNOWN), known >= KNOWN


def _sample(maps_CHW: Tensor, points_hw2: Tensor) -> Tensor:
    """Maps at points, bilinearly; outside, what is at the edge. (C, h, w)."""
    at = (2 * points_hw2 - 1).to(maps_CHW)
    return F.grid_sample(maps_CHW[None], at[None], mode="bilinear", padding_mode="border", align_corners=False)[0]


def finer(points_hw2: Tensor, rows: int, columns: int) -> Tensor:
    """A warp (h, w, 2) on a finer grid (rows, columns, 2): its displacement is interpolated bilinearly."""
    h, w = points_hw2.shape[:2]
    displacement = points_hw2 - grid_points(h, w).view(h, w, 2).to(points_hw2)
    grown = F.interpolate(displacement.permute(2, 0, 1)[None], (rows, columns), mode="bilinear", align_corners=False)
    return grown[0].permute(1, 2, 0) + grid_points(rows, columns).view(rows, columns, 2).to(points_hw2)


def move(image_HW3: Tensor, points: Tensor) -> Tensor:
    """A picture of B seen from A (Fig. 7): its colours at the places that a warp names.

    Args:
        image_HW3: B, uint8.
        points: (H, W, 2) the warp, at every pixel of A.

    Returns:
        (H, W, 3) uint8.
    """
    return _sample(image_HW3.permute(2, 0, 1).float(), points).permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)

"""Dense warps: the true one from depth and pose, upsampling of coarse ones, and images sampled along them.

Points of warps are in normalised image coordinates: (0, 0) is the upper left corner of the image, (1, 1) the lower
right one, so a warp does not depend on the resolution. A warp gives for every point of image A the point of image B
that shows the same point of the scene.

Legend: N points, h w a coarse grid, H W pixels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_DEPTH_ERROR = 0.05  # |z_b - z| / z_b below which both are the same surface: RoMa's `get_gt_warp`
KNOWN = 0.5  # least share of a bilinear sample's weight on known depth


class Warp(NamedTuple):
    """Where points of A are in B."""

    points: Tensor  # (..., N, 2), undefined where not visible
    visible: Tensor  # (..., N) bool


def grid_points(rows: int, columns: int) -> Tensor:
    """Centres of the cells of a grid, row by row, (rows * columns, 2) float64."""
    y = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1)


def true_warp(points: Tensor, depth_a: Tensor, depth_b: Tensor, K_a: Tensor, K_b: Tensor, b_from_a: Tensor) -> Warp:
    """The warp from depth and pose (RoMa's `get_gt_warp`): unproject A's points with A's depth, project into B.

    A point is visible if its depth is known, it lies in front of B and inside B's image, and B's depth there agrees
    with its own within 5 %. Depth is sampled bilinearly over known values only.

    Args:
        points: (..., N, 2) in A, floating point; the result has its dtype.
        depth_a, depth_b: (..., H, W) z-depth, 0 where it is unknown.
        K_a, K_b: (..., 3, 3) intrinsics in pixels of the depth maps.
        b_from_a: (..., 4, 4) camera A to camera B.
    """
    K_a, K_b, b_from_a = (x.to(points) for x in (K_a, K_b, b_from_a))
    size_a, size_b = (torch.tensor(x.shape[:-3:-1]).to(points) for x in (depth_a, depth_b))
    depth, known = _sample_depth(depth_a, points)
    pixels = torch.cat([points * size_a, torch.ones_like(points[..., :1])], -1)
    in_a = pixels @ torch.linalg.inv(K_a).mT * depth[..., None]
    in_b = in_a @ b_from_a[..., :3, :3].mT + b_from_a[..., None, :3, 3]
    z = in_b[..., 2]
    ahead = known & (z > 0)
    projected = in_b @ K_b.mT
    landed = projected[..., :2] / torch.where(ahead, projected[..., 2], 1.0)[..., None] / size_b
    inside = ((landed >= 0) & (landed < 1)).all(-1)
    z_b, known_b = _sample_depth(depth_b, landed)
    same = (z_b - z).abs() < MAX_DEPTH_ERROR * z_b
    return Warp(landed, ahead & inside & known_b & same)


def _sample_depth(depth: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Depth at points, (..., N), and whether it is known there."""
    depth = depth.to(points)
    found = sample(torch.stack([depth, (depth > 0).to(points)], -3), points[..., None, :, :])
    weighted, known = found.squeeze(-2).unbind(-2)
    return weighted / known.clamp(min=KNOWN), known >= KNOWN


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Maps (..., C, H, W) at points (..., h, w, 2), bilinearly, (..., C, h, w); outside, the value at the edge."""
    at = (2 * points - 1).to(maps).reshape(-1, *points.shape[-3:])
    maps_NCHW = maps.reshape(-1, *maps.shape[-3:])
    found = F.grid_sample(maps_NCHW, at, mode="bilinear", padding_mode="border", align_corners=False)
    return found.view(*maps.shape[:-2], *points.shape[-3:-1])


def upsample_warp(points: Tensor, rows: int, columns: int) -> Tensor:
    """A warp (h, w, 2) on a finer grid (rows, columns, 2): its displacement is interpolated bilinearly."""
    h, w = points.shape[:2]
    displacement = points - grid_points(h, w).view(h, w, 2).to(points)
    fine = F.interpolate(displacement.permute(2, 0, 1)[None], (rows, columns), mode="bilinear", align_corners=False)
    return fine[0].permute(1, 2, 0) + grid_points(rows, columns).view(rows, columns, 2).to(points)


def warp_image(image: Tensor, points: Tensor) -> Tensor:
    """Image B (H, W, 3) uint8 seen from A (Fig. 7): its colours (h, w, 3) uint8 at the points (h, w, 2) of a warp."""
    return sample(image.permute(2, 0, 1).float(), points).permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)

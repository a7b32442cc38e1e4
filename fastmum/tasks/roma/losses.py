"""True warps and losses of matching, as in RoMa's training code.

Shapes are static: pixels without a true warp are masked, not dropped, so nothing waits for the device.

Legend: B pairs, (h, w) map of a stride, (H, W) depth maps.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.geometry.warp import MAX_DEPTH_ERROR
from fastmum.tasks.roma.coarse import grid
from fastmum.tasks.roma.decoder import ScaleOutput

EPS = 1e-4  # added to the divisor of the projection
ALPHA, C = 0.5, 1e-4  # exponent of the robust loss, and its scale at stride 1
CERTAINTY = 0.01  # weight of the certainty's loss
PIXEL = 2 / 512  # a pixel of 512 x 512 in the unit of warps
LOCAL = {8: 8.0, 4: 8.0, 2: 4.0, 1: 4.0}  # strides' largest error of the stride before, in pixels times the stride
PCK = 0.5  # pixels of 512, below which a match at stride 1 is correct


class TrueWarp(NamedTuple):
    """Where pixels of the first image are in the second."""

    points: Tensor  # (B, 2, h, w) float32, undefined where not visible
    visible: Tensor  # (B, h, w) bool


@torch.no_grad()
def true_warps(
    depth_a: Tensor, depth_b: Tensor, K_a: Tensor, K_b: Tensor, b_from_a: Tensor, sizes: Sequence[tuple[int, ...]]
) -> list[TrueWarp]:
    """True warps on grids of some sizes (h, w), from the whole depth maps, in float64 (RoMa's `get_gt_warp`).

    `fastmum.geometry.warp.true_warp` differs next to unknown depth, at the border, and behind the camera.

    Args:
        depth_a, depth_b: (B, H, W) z-depth, 0 where it is unknown; sampled bilinearly.
        K_a, K_b: (B, 3, 3) in pixels of the depth maps, centres at +0.5.
        b_from_a: (B, 4, 4) camera A to camera B.
    """
    depth_a, depth_b, K_a, K_b, T = (x.double() for x in (depth_a, depth_b, K_a, K_b, b_from_a))
    size_a, size_b = (torch.tensor(x.shape[:0:-1], device=x.device).double() for x in (depth_a, depth_b))
    rays = T[:, :3, :3] @ torch.linalg.inv_ex(K_a).inverse  # of pixels of A, in the axes of B
    found = []
    for h, w in sizes:
        points = grid((h, w), depth_a.device).double().expand(len(depth_a), -1, -1, -1)
        z = _sample(depth_a, points).flatten(1)[:, None]  # (B, 1, h w)
        pixels = torch.cat([(points.flatten(2) + 1) / 2 * size_a[:, None], torch.ones_like(z)], 1)
        in_b = rays @ pixels * z + T[:, :3, 3:]
        projected = K_b @ in_b
        at = projected[:, :2] / (projected[:, 2:] + EPS)  # pixels of B
        inside = ((at > 0) & (at < size_b[:, None] - 1)).all(1)
        points = (2 * at / size_b[:, None] - 1).unflatten(2, (h, w))
        seen = _sample(depth_b, points).flatten(1)
        same = ((seen - in_b[:, 2]) / seen).abs() < MAX_DEPTH_ERROR
        visible = (z[:, 0] != 0) & inside & same
        found.append(TrueWarp(points.float(), visible.unflatten(1, (h, w))))
    return found


def _sample(depth: Tensor, points: Tensor) -> Tensor:
    """Depth (B, H, W) at points (B, 2, h, w), bilinearly, 0 outside."""
    return F.grid_sample(depth[:, None], points.permute(0, 2, 3, 1), align_corners=False)[:, 0]


def losses_of(outputs: Mapping[int, ScaleOutput], truth: Sequence[TrueWarp]) -> dict[str, Tensor]:
    """Terms of all strides, and `objective`, their weighted sum; 0-d each.

    A pixel counts at strides up to 8 if the error at the stride before was small enough. At the last stride `certain`
    is the number of those pixels, and `pck` the share of correct matches among them. `truth` is in the order of
    `outputs`, coarse to fine.
    """
    losses, error = dict[str, Tensor](), None
    for (stride, out), (points, visible) in zip(outputs.items(), truth, strict=True):
        if error is not None and stride in LOCAL:
            before = F.interpolate(error[:, None], visible.shape[1:], mode="nearest-exact")[:, 0]
            visible = visible & (before < PIXEL * LOCAL[stride] * stride)
        target, count = visible.float(), visible.sum().clamp(min=1)
        if out.anchor_logits is not None and out.anchor_certainty is not None:
            # The anchor nearest to each point; points that are not finite, which are never visible, have any.
            side = math.isqrt(out.anchor_logits.shape[1])
            column, row = ((points.nan_to_num(-1) + 1) / 2 * side).floor().clamp(0, side - 1).long().unbind(1)
            anchors = F.cross_entropy(out.anchor_logits, row * side + column, reduction="none")
            losses[f"anchors_{stride}"] = torch.where(visible, anchors, 0).sum() / count
            bce = F.binary_cross_entropy_with_logits(out.anchor_certainty[:, 0], target)
            losses[f"anchor_certainty_{stride}"] = bce
        difference = torch.where(visible[:, None], out.flow - points, 0)
        scale = C * stride
        robust = scale**ALPHA * ((difference / scale).square().sum(1) + 1) ** (ALPHA / 2)
        losses[f"regression_{stride}"] = torch.where(visible, robust, 0).sum() / count
        losses[f"certainty_{stride}"] = F.binary_cross_entropy_with_logits(out.certainty[:, 0], target)
        error = (out.flow.detach() - points).norm(dim=1)
        correct = visible & (error < PCK * PIXEL)
    objective = torch.stack([CERTAINTY * x if "certainty" in name else x for name, x in losses.items()]).sum()
    return losses | {"objective": objective, "pck": correct.sum() / count, "certain": visible.sum()}

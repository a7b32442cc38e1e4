"""Losses of cameras, depth and points (supplement B, Eq. 3), as in VGGT's training code; normalisation of scenes.

Shapes are static: invalid pixels are masked, not dropped, so nothing waits for the device. Non-finite values of the
truth and of losses become 0, and both are clamped to +-100, first of all.

Legend: F frames, n sequences, (H, W) pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.tasks.reconstruction.aggregator import Sequences
from fastmum.tasks.reconstruction.camera import encode_cameras

LIMIT = 100.0  # largest absolute value of the truth and of a loss
ITERATION_DECAY = 0.6  # weight of a camera iteration over that of the next
FOV_WEIGHT = 0.5
ALPHA = 0.2  # of log(confidence)
QUANTILE = 0.98  # residuals from here on are dropped,
LEAST_FILTERED = 1000  # if more than so many are there, and are left
LEAST_PIXELS = 100  # valid ones for depth and points in a batch; for cameras, more in the first frame of a sequence
LEAST_NORMALS = 10
DEPTH_STRIDES = (1, 2, 4, 8)
NORMAL_STRIDES = (1, 2, 4)


class Prediction(NamedTuple):
    """Output of the model, in float32."""

    cameras: list[Tensor]  # (F, 9) of each refinement (`encode_cameras`)
    depth: Tensor  # (F, H, W)
    depth_confidence: Tensor  # (F, H, W), above 1
    points: Tensor | None  # (F, H, W, 3) in the axes of the first camera of the sequence; None: there is no such head
    points_confidence: Tensor | None


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms (davnords/vggt), and the camera loss."""

    camera: float = 5.0
    depth: float = 1.0
    points: float = 1.0
    camera_loss: Literal["l1", "huber"] = "l1"  # of the training code, or of the papers, which do not state its delta
    huber_delta: float = 1.0


class Scene(NamedTuple):
    """The truth. Scenes are normalised by `normalise_scenes`; predictions are not."""

    camera_from_world: Tensor  # (F, 3 or 4, 4)
    K: Tensor  # (F, 3, 3) in pixels
    depth: Tensor  # (F, H, W)
    points: Tensor  # (F, H, W, 3), world
    valid: Tensor  # (F, H, W) bool, pixels with depth


def normalise_scenes(scene: Scene, sequences: Sequences) -> Scene:
    """Move the world to the first camera of every sequence; the mean distance of valid points from it becomes 1."""
    T, points = scene.camera_from_world, scene.points
    R, t = T[:, :3, :3], T[:, :3, 3:]
    R_0, t_0 = (x[sequences.firsts][sequences.of_frame] for x in (R, t))
    points = points @ R_0.mT[:, None] + t_0.mT[:, None]
    distances = torch.where(scene.valid, points.norm(dim=-1), 0).sum((1, 2))
    totals = torch.stack([distances, scene.valid.sum((1, 2), dtype=points.dtype)])
    totals = torch.stack([part.sum(1) for part in totals.split(sequences.lengths, dim=1)], dim=1)  # a fixed order
    scale = (totals[0] / (totals[1] + 1e-3)).clamp(1e-6, 1e6)[sequences.of_frame][:, None, None]
    relative = R @ R_0.mT
    pose = torch.cat([relative, (t - relative @ t_0) / scale], dim=-1)
    pose = torch.cat([pose, T[:, 3:]], dim=1)
    return Scene(pose, scene.K, scene.depth / scale, points / scale[..., None], scene.valid)


def unproject(depth: Tensor, K: Tensor, camera_from_world: Tensor) -> Tensor:
    """World points (F, H, W, 3) of depth maps (F, H, W); pixel centres are at +0.5, as in `fastmum.geometry`."""
    H, W = depth.shape[1:]
    y, x = (torch.arange(n, dtype=depth.dtype, device=depth.device) + 0.5 for n in (H, W))
    fx, fy, cx, cy = (K[:, i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    skew = K[:, 0, 1, None, None]
    vertical = ((y[:, None] - cy) / fy).expand_as(depth)
    horizontal = (x - cx - skew * vertical) / fx
    points = torch.stack([horizontal, vertical, torch.ones_like(depth)], -1) * depth[..., None]
    R, t = camera_from_world[:, None, :3, :3], camera_from_world[:, None, None, :3, 3]
    return (points - t) @ R


def clean(x: Tensor) -> Tensor:
    """Non-finite values become 0, others are clamped to +-`LIMIT`."""
    return torch.where(x.isfinite(), x, 0).clamp(-LIMIT, LIMIT)


def losses_of(prediction: Prediction, scene: Scene, sequences: Sequences, weights: LossWeights) -> dict[str, Tensor]:
    """All terms of a batch with a normalised scene, and `objective`, their weighted sum; 0-d each."""
    cameras = encode_cameras(scene.camera_from_world, scene.K, (scene.depth.shape[1], scene.depth.shape[2]))
    losses = camera_losses(
        prediction.cameras, cameras, scene.valid, sequences, weights.camera_loss, weights.huber_delta
    )
    dense = depth_losses(prediction.depth, prediction.depth_confidence, scene.depth, scene.valid)
    losses |= {f"depth_{name}": loss for name, loss in dense.items()}
    objective = weights.camera * losses["camera"] + weights.depth * torch.stack([*dense.values()]).sum()
    if prediction.points is not None and prediction.points_confidence is not None:
        dense = point_losses(prediction.points, prediction.points_confidence, scene.points, scene.valid)
        losses |= {f"points_{name}": loss for name, loss in dense.items()}
        objective = objective + weights.points * torch.stack([*dense.values()]).sum()
    return losses | {"objective": objective}


def camera_losses(
    predictions: Sequence[Tensor], target: Tensor, valid: Tensor, sequences: Sequences,
    kind: Literal["l1", "huber"] = "l1", delta: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """Errors of translation, rotation and field of view, and `camera`, their sum.

    Only sequences count whose first frame has more than `LEAST_PIXELS` valid pixels. Mean over the refinements, each
    weighted by `ITERATION_DECAY`.

    Args:
        predictions: (F, 9) of each refinement.
        target: (F, 9).
        valid: (F, H, W) bool.
        kind, delta: see `LossWeights`.
    """
    counted = (valid[sequences.firsts].sum((1, 2)) > LEAST_PIXELS)[sequences.of_frame][:, None]
    frames = counted.sum().clamp(min=1)
    losses = {name: target.new_zeros(()) for name in ("translation", "rotation", "fov")}
    for i, prediction in enumerate(predictions):
        weight = ITERATION_DECAY ** (len(predictions) - 1 - i) / len(predictions)
        # Huber's loss of the error, so that a non-finite one is replaced first.
        error = clean((prediction - target).abs())
        if kind == "huber":
            error = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)
        means = torch.where(counted, error, 0).sum(0) / frames
        for name, numbers in (("translation", slice(0, 3)), ("rotation", slice(3, 7)), ("fov", slice(7, 9))):
            losses[name] = losses[name] + weight * means[numbers].mean()
    total = losses["translation"] + losses["rotation"] + FOV_WEIGHT * losses["fov"]
    return losses | {"camera": total}


def depth_losses(depth: Tensor, confidence: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Losses of depth maps (F, H, W) each: `confidence`, `error` and `gradient`."""
    target = clean(target)
    residual = (target - depth).abs()
    gradients = [_gradient_loss(*(x[:, ::s, ::s] for x in (depth, target, valid))) for s in DEPTH_STRIDES]
    return _dense_losses(residual, confidence, torch.stack(gradients).mean(), valid)


def point_losses(points: Tensor, confidence: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Losses of point maps (F, H, W, 3): `confidence`, `error` and `gradient`, which compares normals."""
    target = clean(target)
    residual = (target - points).norm(dim=-1)
    normals = [_normal_loss(*(x[:, ::s, ::s] for x in (points, target, valid))) for s in NORMAL_STRIDES]
    return _dense_losses(residual, confidence, torch.stack(normals).mean(), valid)


def _dense_losses(residual: Tensor, confidence: Tensor, gradient: Tensor, valid: Tensor) -> dict[str, Tensor]:
    residual = clean(residual)
    weighted = clean(residual * confidence - ALPHA * confidence.log())
    losses = {"confidence": _filtered_mean(weighted, valid), "error": _filtered_mean(residual, valid)}
    enough = valid.sum() >= LEAST_PIXELS
    return {name: torch.where(enough, loss, 0) for name, loss in (losses | {"gradient": gradient}).items()}


def _filtered_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over valid pixels below the quantile (nearest rank), if there are enough."""
    count = valid.sum()
    # The values from the quantile on are the largest ones; their number is known but for the invalid pixels.
    most = math.ceil((1 - QUANTILE) * values.numel()) + 2
    largest = torch.where(valid, values.detach(), -torch.inf).flatten().topk(min(most, values.numel())).values
    rank = count - 1 - (QUANTILE * (count - 1).double()).round().long()  # from the top
    threshold = largest.take(rank.clamp(0, len(largest) - 1)).clamp(max=LIMIT)
    below = valid & (values < threshold)
    kept = torch.where((count > LEAST_FILTERED) & (below.sum() > LEAST_FILTERED), below, valid)
    return torch.where(kept, values, 0).sum() / kept.sum().clamp(min=1)


def _gradient_loss(depth: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean difference of the errors of neighbours, along both axes."""
    error, total = torch.where(valid, depth - target, 0), depth.new_zeros(())
    for axis in (1, 2):
        both = valid.narrow(axis, 1, valid.shape[axis] - 1) & valid.narrow(axis, 0, valid.shape[axis] - 1)
        total = total + torch.where(both, error.diff(dim=axis).abs(), 0).clamp(max=LIMIT).sum()
    return total / valid.sum().clamp(min=1)


def _normal_loss(points: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """1 - cosine of the normals, four at every pixel, where three neighbours are valid."""
    normals, where = _normals(points, valid)
    cosines = (normals * _normals(target, valid)[0]).sum(-1).clamp(-1 + 1e-8, 1 - 1e-8)
    count = where.sum()
    mean = torch.where(where, clean(1 - cosines), 0).sum() / count.clamp(min=1)
    return torch.where(count >= LEAST_NORMALS, mean, 0)


def _normals(points: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Unit normals (4, F, H, W, 3) from the cross products of neighbours, and where they are valid (4, F, H, W)."""
    around, inside = F.pad(points, (0, 0, 1, 1, 1, 1)), F.pad(valid, (1, 1, 1, 1))
    H, W = valid.shape[1:]
    corners = (0, 1), (1, 0), (2, 1), (1, 2)  # up, left, down, right
    steps = [around[:, y : y + H, x : x + W] - points for y, x in corners]
    known = [inside[:, y : y + H, x : x + W] & valid for y, x in corners]
    normals = torch.stack([torch.linalg.cross(steps[i], steps[(i + 1) % 4]) for i in range(4)])
    return F.normalize(normals, dim=-1, eps=1e-8), torch.stack([known[i] & known[(i + 1) % 4] for i in range(4)])

"""Scores of predictions of held-out scenes during training: loss, accuracy of cameras, error of depth."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastmum.engine.distributed import DistContext
from fastmum.geometry.metrics import direction_error, pair_poses, rotation_error_quaternion
from fastmum.tasks.reconstruction.camera import decode_cameras
from fastmum.tasks.reconstruction.losses import Prediction, Scene

DEGREES = 30  # of AUC@30
FIXED = 6  # sums before those


class Scores:
    """Sums over batches and processes.

    Depth is scored in the unit of the normalised scene (`normalise_scenes`), without any alignment: the model has to
    predict that scale. `mean_depth` is what a trivial prediction says everywhere, in the same unit.
    """

    def __init__(self, world: DistContext, mean_depth: float = 1.0) -> None:
        self._world, self._mean_depth = world, mean_depth
        # Losses, batches; relative errors of depth, and of the trivial one, pixels; pairs of frames, and those with
        # errors of each degree.
        self._sums = np.zeros(FIXED + DEGREES)

    def add(self, prediction: Prediction, truth: Scene, lengths: Sequence[int], loss: Tensor) -> None:
        """Add a batch with its normalised truth."""
        depth, valid = truth.depth, truth.valid
        depths = prediction.depth, torch.full_like(depth, self._mean_depth)
        errors = [torch.where(valid, (x - depth).abs() / depth.clamp(min=1e-8), 0).sum() for x in depths]
        self._sums[: FIXED - 1] += [float(loss), 1, *map(float, errors), float(valid.sum())]
        found, _ = decode_cameras(prediction.cameras[-1].double(), (depth.shape[1], depth.shape[2]))
        poses = [T.split(tuple(lengths)) for T in (found.cpu(), truth.camera_from_world.double().cpu())]
        for predicted, true in zip(*poses, strict=True):
            self._add_pairs(*(pair_poses(T.numpy()) for T in (predicted, true)))

    def _add_pairs(self, predicted: np.ndarray, true: np.ndarray) -> None:
        """The larger of rotation and direction error counts (VGGT)."""
        rotation = rotation_error_quaternion(predicted[:, :3, :3], true[:, :3, :3])
        direction = direction_error(predicted[:, :3, 3], true[:, :3, 3], folded=True)
        errors = np.nan_to_num(np.maximum(rotation, direction), nan=np.inf)
        self._sums[FIXED - 1] += len(errors)
        self._sums[FIXED:] += np.histogram(errors[errors <= DEGREES], np.arange(DEGREES + 1))[0]

    def compute(self) -> dict[str, float]:
        """`held_out_loss`; `auc30`, the area under the recall of relative poses up to 30 degrees; `abs_rel`.

        `abs_rel_of_mean_depth` is the error of the trivial depth.
        """
        sums = torch.from_numpy(self._sums).to(self._world.device)
        self._world.sum_(sums)
        loss, batches, relative, trivial, pixels, pairs, *counts = sums.tolist()
        scores = {"held_out_loss": loss / batches}
        if pairs:
            scores["auc30"] = float(np.cumsum(counts).mean() / pairs)
        if pixels:
            scores |= {"abs_rel": relative / pixels, "abs_rel_of_mean_depth": trivial / pixels}
        return scores

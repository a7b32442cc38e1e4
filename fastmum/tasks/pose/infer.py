"""Trained runs of relative pose for inference."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastmum.data.pair_loader import crop_view
from fastmum.engine.device import autocast, pick_precision
from fastmum.errors import FastmumError
from fastmum.geometry import Camera, View
from fastmum.geometry.camera import intrinsics_matrix
from fastmum.model.encoder import Encoder
from fastmum.tasks.pose.config import PoseSection
from fastmum.tasks.pose.model import RelativePose
from fastmum.tasks.trained import Trained, load_trained


def load_run(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", encoder: str | None = None
) -> Trained[RelativePose]:
    """Load a run; see `load_trained`."""

    def make(settings: PoseSection, loaded: Encoder) -> RelativePose:
        sizes = settings.sizes(loaded.embed_dim, loaded.config.patch_size)
        return RelativePose(sizes, loaded, settings.normalisation == "half")

    return load_trained(path, "pose", PoseSection, make, 256, device, encoder)


def prepare(view: View, size: int, file: Path) -> View:
    """The image as the model reads it: the largest square around the principal point, `size` pixels wide.

    Without intrinsics the principal point is the image's centre. FastmumError, which names `file`, if the point is not
    inside the image.
    """
    if view.camera is None:
        width, height = view.size
        K = intrinsics_matrix(np.nan, np.nan, width / 2, height / 2)
        view = replace(view, camera=Camera(K, np.full((4, 4), np.nan), view.size))
    try:
        return crop_view(replace(view, depth=None, mask=None), (size, size))
    except FastmumError as error:
        raise FastmumError(f"'{file}': {error}") from None


@torch.inference_mode()
def estimate(model: RelativePose, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Poses of pairs of images (B, 2, H, W, 3) uint8: rotations (B, 3, 3) and translations (B, 3), float64.

    They are of view 2 in view 1, x_1 = R x_2 + t; the length of t means nothing.
    """
    device = next(model.parameters()).device
    with autocast(device, pick_precision("auto", device)):
        R, t = model(torch.from_numpy(images).flatten(0, 1).to(device))
    return R[1::2].double().cpu().numpy(), t[1::2].double().cpu().numpy()

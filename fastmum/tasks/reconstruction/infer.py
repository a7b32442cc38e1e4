"""Trained runs for inference: the model, and cameras, depth and points of the frames of one scene."""

import os
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmum.engine.device import autocast, pick_precision
from fastmum.files import expand_user
from fastmum.geometry.camera import rigid_inverse, transform, unproject
from fastmum.model.encoder import Encoder
from fastmum.progress import progress_bar
from fastmum.tasks.reconstruction.aggregator import Sequences
from fastmum.tasks.reconstruction.camera import decode_cameras
from fastmum.tasks.reconstruction.load import read_run
from fastmum.tasks.reconstruction.model import Reconstruction
from fastmum.tasks.trained import Trained

FOV = (0.02, 3.1)  # radians; untrained heads predict fields of view that no camera has


class Estimate(NamedTuple):
    """What the model predicts for the frames of one scene; the world is the first camera, its unit arbitrary."""

    camera_from_world: np.ndarray  # (F, 4, 4) float64
    K: np.ndarray  # (F, 3, 3) float64, pixels; the principal point is the centre
    depth: np.ndarray  # (F, H, W) float32
    confidence: np.ndarray  # (F, H, W) float32, above 1, of the points if there are any, else of the depth
    points: np.ndarray | None = None  # (F, H, W, 3) float32, from the head of points

    def world_points(self) -> np.ndarray:
        """Those of the head of points, else the unprojected depth; (F, H, W, 3) float32."""
        if self.points is not None:
            return self.points
        frames = zip(self.depth, self.K, rigid_inverse(self.camera_from_world), strict=True)
        return np.stack([transform(T, unproject(depth, K)).astype(np.float32) for depth, K, T in frames])


def load_run(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", encoder: str | None = None
) -> Trained[Reconstruction]:
    """Load a run, a folder of checkpoints or a checkpoint; EMA weights if it has them.

    Errors as of `read_run`.

    Args:
        encoder: spec of the encoder, if its files were moved.
    """
    model, manifest = read_run(expand_user(path), encoder)
    for head in model.dense_heads():
        head.chunk = manifest.values["config"].get("model.chunk", head.chunk)
    return Trained.of(model, manifest, 512, device)


@torch.inference_mode()
def estimate(model: Reconstruction, images: Tensor, points: bool = False, show: bool = False) -> Estimate:
    """Predict the frames of one scene, images (F, H, W, 3) uint8 on any device, on the device of the model.

    Encoder and dense heads take a few frames at once (`Dpt.chunk`); attention takes all. The device holds about
    `memory_bytes`. With `points`, the head of points predicts the points and their confidence, if there is one. `show`
    shows a progress bar.
    """
    head, device = model.depth_head, next(model.parameters()).device
    frames, chunk = len(images), head.chunk
    sequences = Sequences.of([frames], device)
    parts = [slice(i, min(i + chunk, frames)) for i in range(0, frames, chunk)]
    bar = progress_bar(total=3 * frames, unit="frame", desc="predicting", show=show, leave=False)
    with bar, autocast(device, pick_precision("auto", device)):
        assert isinstance(model.encoder, Encoder)
        encoded = []
        for part in parts:
            (tokens,) = model.encoder.tokens(images[part].to(device), norm=True)
            encoded.append(tokens.patch)
            bar.update(len(tokens.patch))
        config, grid = model.config, tokens.grid
        taps = *config.taps, config.pairs - 1
        *taps, last = model.aggregator(torch.cat(encoded), grid, sequences, taps)
        del encoded
        cameras = model.camera_head(last.select(tokens=slice(0, 1))[:, 0], sequences)[-1]
        bar.update(frames)
        maps = []
        for part in parts:
            found = [head(taps, grid, config.patch_size, part)]
            if points and model.point_head is not None:
                found.append(model.point_head(taps, grid, config.patch_size, part))
            maps.append([each.cpu().numpy() for pair in found for each in pair])
            bar.update(part.stop - part.start)
    depth, confidence, *more = (np.concatenate(each) for each in zip(*maps, strict=True))
    cameras = torch.cat([cameras[:, :7], cameras[:, 7:].clamp(*FOV)], dim=1).double().cpu()
    T, K = decode_cameras(cameras, (depth.shape[1], depth.shape[2]))
    return Estimate(T.numpy(), K.numpy(), depth, more[1] if more else confidence, more[0] if more else None)


def memory_bytes(model: Reconstruction, frames: int, size: tuple[int, int]) -> int:
    """About what `estimate` holds on the device for frames of `size` (height, width), without the weights, in float32.

    T tokens of width C: the two outputs of each pair that the heads read, and in a block the stream, queries, keys and
    values, before and after rotation, or the four times as wide hidden layer: 12 C at most; and the encoder's tokens.
    """
    config, patch = model.config, model.config.patch_size
    tokens = frames * (model.aggregator.special + (size[0] // patch) * (size[1] // patch))
    outputs = 2 * len({*config.taps, config.pairs - 1})
    return 4 * tokens * ((outputs + 12) * config.embed_dim + config.encoder_dim)

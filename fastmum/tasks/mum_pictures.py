"""Reconstruction pictures: for each sequence a row of originals, of what the encoder saw, and of what was predicted.

Legend: F frames, H W pixels, p patch side, M masked patches of a frame.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmum.kernels import gather_patches
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD

GREY = 118  # of masked patches, out of 255
GAP = 4  # pixels between pictures
SEQUENCE_GAP = 16  # pixels between sequences


def draw_reconstruction(
    frames: Tensor, lengths: tuple[int, ...], masked_ids: Tensor, pred: Tensor, norm_pix: bool = True
) -> Image.Image:
    """Draw what the model made of masked frames.

    Args:
        frames: (F, H, W, 3) uint8, sequences one behind another.
        lengths: frames of each sequence.
        masked_ids, pred: (F, M) and (F, M, 3*p*p) float32 of `MuMOutput`; all on the CPU.
        norm_pix: whether the loss normalised its targets.

    Returns:
        For each sequence three rows (original, masked, predicted), one column a view.
    """
    masked, predicted = reconstructions(frames, masked_ids, pred, norm_pix)
    rows = []
    for sequence in zip(*(stack.split(lengths) for stack in (frames, masked, predicted)), strict=True):
        rows += [_side_by_side(stack.numpy()) for stack in sequence]
    return Image.fromarray(_stack(rows))


def reconstructions(frames: Tensor, masked_ids: Tensor, pred: Tensor, norm_pix: bool = True) -> tuple[Tensor, Tensor]:
    """Frames with their masked patches in grey, and as predicted, (F, H, W, 3) uint8 each; arguments as above."""
    side = int((pred.shape[-1] // 3) ** 0.5)
    patches = _pixels(frames, masked_ids, pred, side, norm_pix)
    return _put(frames, masked_ids, torch.full_like(patches, GREY)), _put(frames, masked_ids, patches)


def _pixels(frames: Tensor, ids: Tensor, pred: Tensor, side: int, norm_pix: bool) -> Tensor:
    """Predictions as uint8 pixels (F, M, p, p, 3).

    With `norm_pix` the model predicts patches without mean and contrast; the picture takes both from the original.
    """
    values = pred
    if norm_pix:
        original = gather_patches(frames, ids, IMAGENET_MEAN, IMAGENET_STD, side, torch.float32)
        var, mean = torch.var_mean(original, dim=-1, keepdim=True)
        values = pred * (var + 1e-6).sqrt() + mean
    values = values.unflatten(-1, (side, side, 3))
    pixels = (values * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _put(frames: Tensor, ids: Tensor, patches: Tensor) -> Tensor:
    """A copy of the frames (F, H, W, 3) with the patches (F, M, p, p, 3) at the places `ids` (F, M)."""
    F, H, W, C = frames.shape
    p = patches.shape[2]
    grid = frames.clone().view(F, H // p, p, W // p, p, C)
    frame = torch.arange(F)[:, None]
    grid[frame, ids // (W // p), :, ids % (W // p)] = patches
    return grid.view(F, H, W, C)


def _side_by_side(views: np.ndarray) -> np.ndarray:
    gap = np.full((views.shape[1], GAP, 3), 255, np.uint8)
    return np.concatenate([part for view in views for part in (view, gap)][:-1], axis=1)


def _stack(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of three for each sequence, below one another, those of fewer views filled up with white."""
    width = max(row.shape[1] for row in rows)
    parts = []
    for i, row in enumerate(rows):
        below = SEQUENCE_GAP if i % 3 == 2 else GAP
        canvas = np.full((row.shape[0] + below, width, 3), 255, np.uint8)
        canvas[: row.shape[0], : row.shape[1]] = row
        parts.append(canvas)
    return np.concatenate(parts)

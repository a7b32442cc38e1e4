"""Checks of the model's arguments, and random masking.

Checks raise a TypeError or ValueError that names the argument, its value and what is allowed. Masks are uniform, with
the same number of visible patches in every frame (paper, section 3).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)  # of values in 0..1, RGB
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)
_NOISE_STREAM = 1  # differs from the sampler's stream of the same seed, rank and step


class Pixels(NamedTuple):
    """Frames (F, H, W, C) as the kernels read them; (value - mean) / std is not applied yet."""

    frames: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    patch_size: int
    grid: tuple[int, int]  # rows and columns of patches


def check_frames(
    frames: Tensor, patch_size: int, in_chans: int, name: str = "frames", mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Pixels:  # fmt: skip
    """Check raw uint8 frames (F, H, W, C), to be normalised by `mean` and `std`, or normalised ones (F, C, H, W)."""
    if not isinstance(frames, Tensor):
        raise TypeError(f"{name} is a {type(frames).__name__}, but must be a tensor")
    shape = tuple(frames.shape)
    if frames.dtype == torch.uint8:
        layout = "(F, H, W, 3) uint8"
        fits = frames.ndim == 4 and shape[3] == in_chans == len(mean)
    elif frames.is_floating_point():
        layout, mean, std = f"(F, {in_chans}, H, W) floating point", (0.0,) * in_chans, (1.0,) * in_chans
        fits = frames.ndim == 4 and shape[1] == in_chans
        frames = frames.permute(0, 2, 3, 1) if fits else frames
    else:
        raise TypeError(
            f"{name} has dtype {frames.dtype}, but must be uint8 (raw, (F, H, W, 3)) or floating point "
            f"(ImageNet-normalised, (F, {in_chans}, H, W))"
        )
    if not fits or shape[0] == 0:
        raise ValueError(f"{name} has shape {shape}, but {layout} with at least one frame is expected")
    _, height, width, _ = frames.shape
    if min(height, width) < patch_size or height % patch_size or width % patch_size:
        raise ValueError(
            f"{name} is {height} x {width} pixels, but height and width must be positive multiples of the patch "
            f"size {patch_size}"
        )
    return Pixels(frames, mean, std, patch_size, (height // patch_size, width // patch_size))


def check_lengths(lengths: Tensor | Sequence[int], max_views: int | None, num_frames: int) -> tuple[Tensor, int]:
    """Check the frames of each sequence, a list or an integer tensor that may be padded with zeros, and their bound.

    Returns lengths (n,) int64 on the CPU, and `max_views`, by default the number of frames. Compiled code does not see
    values, and does not check them.
    """
    if max_views is not None and not hasattr(max_views, "__index__"):
        raise TypeError(f"max_views is {max_views!r}, but must be an integer or None")
    bound = num_frames if max_views is None else max_views
    expected = "must be a 1-D integer tensor or a list of integers"
    if isinstance(lengths, Tensor):
        if lengths.ndim != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths is a {lengths.dtype} tensor of shape {tuple(lengths.shape)}, but {expected}")
        lengths = lengths.to("cpu", torch.int64)
        if torch.compiler.is_compiling():
            return lengths, bound
        used = lengths.tolist()
        while used and used[-1] == 0:
            used.pop()
    elif isinstance(lengths, (str, bytes)) or not isinstance(lengths, Sequence):
        raise TypeError(f"lengths is a {type(lengths).__name__}, but {expected}")
    elif any(isinstance(n, bool) or not hasattr(n, "__index__") for n in lengths):
        raise TypeError(f"lengths is {list(lengths)}, but must hold integers")
    else:
        used = [int(n) for n in lengths]
    if not used or min(used) < 1:
        raise ValueError(f"lengths is {used}, but every sequence must have at least one frame")
    if sum(used) != num_frames:
        raise ValueError(f"lengths is {used}, which sums to {sum(used)}, but frames holds {num_frames} frames")
    if max_views is not None and max_views < max(used):
        raise ValueError(f"max_views is {max_views}, but a sequence has {max(used)} frames")
    return torch.tensor(used), bound


def check_noise(noise: Tensor, num_frames: int, num_patches: int) -> None:
    """Check (F, P) floating-point noise."""
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        found = f"has dtype {noise.dtype}" if isinstance(noise, Tensor) else f"is a {type(noise).__name__}"
        raise TypeError(f"noise {found}, but must be a floating-point tensor")
    if tuple(noise.shape) != (num_frames, num_patches):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, but frames has {num_frames} frames of {num_patches} patches: "
            f"({num_frames}, {num_patches}) is expected"
        )


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Visible patches of a frame, int(P * (1 - mask_ratio)); a ValueError if none were visible, or none masked."""
    count = int(num_patches * (1 - mask_ratio)) if 0 <= mask_ratio <= 1 else 0
    if not 0 < count < num_patches:
        found = f"mask_ratio is {mask_ratio} for frames of {num_patches} patches"
        raise ValueError(f"{found}, but must leave at least one patch visible and one masked")
    return count


def split_by_noise(noise: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Split the patches of every frame by uniform noise (F, P) -> visible_ids (F, K) and masked_ids (F, P - K).

    The K = `visible` smallest of a row are visible, ties go to the lower number. Ids are int64, ascending in each row.
    """
    order = torch.argsort(noise, dim=1, stable=True)
    return order[:, :visible].sort(dim=1).values, order[:, visible:].sort(dim=1).values


def seeded_noise(seed: int, rank: int, step: int, num_frames: int, num_patches: int) -> Tensor:
    """The noise of a training step, (F, P) float32 on the CPU: a pure function of its arguments."""
    rng = np.random.default_rng((seed, rank, step, _NOISE_STREAM))
    return torch.from_numpy(rng.random((num_frames, num_patches), dtype=np.float32))

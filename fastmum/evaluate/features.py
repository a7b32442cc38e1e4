"""Frozen features of the frames of a set, computed once, and where their patches truly are in the other view.

Legend: F frames, N pairs, P patches of a frame, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from fastmum.data.errors import DataError
from fastmum.evaluate.pairs import Frame, PairSet, pair_warp
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD

Norm = Literal["layernorm", "raw"]
NORMS: tuple[Norm, ...] = ("layernorm", "raw")
BATCH = 8  # frames encoded at a time
STORED = torch.float16  # of cached features: half the memory, 0.05 % of a value at most


@dataclass(frozen=True)
class Truth:
    """Where the patches of a set truly are in the other view, on the CPU.

    Args:
        pairs: the set.
        target: (N, P, 2) float64, the true warp at the patch centres of the first frame, unit coordinates.
        visible: (N, P) bool, where there is one.
        grid: rows and columns of patches.
    """

    pairs: PairSet
    target: Tensor
    visible: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class Prepared:
    """A set as matchers read it, on the CPU.

    Args:
        truth: the set, and its true warps.
        features: (F, P, D) of every distinct frame, each token divided by its root mean square, which a cosine does not
            see and without which float16 could overflow.
        first, second: (N,) int64, the frames of each pair.
    """

    truth: Truth
    features: Tensor
    first: Tensor
    second: Tensor

    def batches(self, size: int) -> Iterator[Tensor]:
        """Numbers of the pairs, `size` at a time."""
        return iter(torch.arange(len(self.first)).split(size))

    def of(self, pairs: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features of both frames of some pairs, (B, P, D) float32 each."""
        a, b = (self.features[frames[pairs]].to(device, torch.float32) for frames in (self.first, self.second))
        return a, b


def prepare(
    encoder: nn.Module, pairs: PairSet, size: int | None = None, norms: Sequence[Norm] = NORMS, progress: bool = True
) -> dict[Norm, Prepared]:
    """Encode the frames of a set, each once, and compute its true warps.

    Args:
        encoder: see `patch_features`.
        pairs: the set.
        size: side in pixels that pictures are resized to; None: the set's own.
        norms: which features are kept.
        progress: whether to show bars.

    Returns:
        The set with features of each of the norms.

    Raises:
        DataError: a frame that cannot be read, a size that does not fit the encoder, features that are not finite, or
            no visible point in any pair.
    """
    size = check_size(encoder, size or pairs.size)
    frames = {frame.key: frame for pair in pairs.pairs for frame in (pair.a, pair.b)}
    place = {key: i for i, key in enumerate(frames)}
    encoded: dict[Norm, list[Tensor]] = {norm: [] for norm in norms}
    for images in _batches(list(frames.values()), size, progress, f"encoding {pairs.name}"):
        found = patch_features(encoder, images)
        for norm in norms:
            check_finite(found[norm], pairs)
            encoded[norm].append(_scaled(found[norm]).to("cpu", STORED))
    truth = true_warps(pairs, size // patch_size(encoder), progress)
    first = torch.tensor([place[pair.a.key] for pair in pairs.pairs])
    second = torch.tensor([place[pair.b.key] for pair in pairs.pairs])
    return {norm: Prepared(truth, torch.cat(parts), first, second) for norm, parts in encoded.items()}


def true_warps(pairs: PairSet, side: int, progress: bool = True) -> Truth:
    """The true warps of a set at the centres of side x side patches.

    Raises:
        DataError: depth that cannot be read, or no visible point in any pair.
    """
    bar = tqdm(pairs.pairs, desc="true warps", unit="pair", disable=not progress, leave=False)
    warps = [pair_warp(pair, side, side) for pair in bar]
    visible = torch.stack([warp.visible for warp in warps])
    if not visible.any():
        raise DataError(f"no patch of the set '{pairs.name}' is visible in both views: are K, T_b_a and depth right?")
    return Truth(pairs, torch.stack([warp.points for warp in warps]), visible, (side, side))


def check_finite(computed: Tensor, pairs: PairSet) -> None:
    """Look whether what a model makes of a set is finite.

    Raises:
        DataError: it is not.
    """
    if not computed.isfinite().all():
        raise DataError(f"features of the set '{pairs.name}' are not finite: are the weights whole?")


def load_image(frame: Frame, size: int) -> Tensor:
    """The whole picture of a frame, resized to a square as RoMa does, (size, size, 3) uint8.

    Raises:
        DataError: it cannot be read.
    """
    return squared(frame.read_image(), size)


def squared(image: Image.Image, size: int) -> Tensor:
    """A whole picture, resized to a square as RoMa does, (size, size, 3) uint8."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


@torch.no_grad()
def patch_features(encoder: nn.Module, images: Tensor) -> dict[Norm, Tensor]:
    """Last-layer features of the patches of whole pictures.

    Args:
        encoder: has `forward_features` with DINOv2's keys "x_norm_patchtokens" and "x_prenorm": `Encoder`, `MuM` and
            others of that interface. Features are computed on its device.
        images: (F, H, W, 3) uint8.

    Returns:
        (F, P, D) float32 each: "layernorm" behind the encoder's last norm, "raw" before it.
    """
    device = next(encoder.parameters()).device
    mean, std = (torch.tensor(values, device=device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    normalised = (images.to(device).float() / 255 - mean) / std
    features = encoder.forward_features(normalised.permute(0, 3, 1, 2))
    patches = features["x_norm_patchtokens"]
    # CLS, and registers where there are any, come first.
    return {"layernorm": patches.float(), "raw": features["x_prenorm"][:, -patches.shape[1] :].float()}


def _scaled(features: Tensor) -> Tensor:
    return features / features.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)


def patch_size(encoder: nn.Module) -> int:
    """Side of the encoder's patches in pixels."""
    own = getattr(encoder, "patch_size", None)
    return encoder.config.patch_size if own is None else own


def check_size(encoder: nn.Module, size: int) -> int:
    """A size of pictures that the encoder takes.

    Raises:
        DataError: the patch size does not divide it.
    """
    if size < 1 or size % patch_size(encoder):
        raise DataError(f"--size is {size}, but must be a positive multiple of the patch size {patch_size(encoder)}")
    return size


def _batches(frames: Sequence[Frame], size: int, progress: bool, label: str) -> Iterator[Tensor]:
    with tqdm(total=len(frames), desc=label, unit="frame", disable=not progress, leave=False) as bar:
        for start in range(0, len(frames), BATCH):
            images = torch.stack([load_image(frame, size) for frame in frames[start : start + BATCH]])
            yield images
            bar.update(len(images))

"""Frozen features of the frames of a pair set, each frame encoded once, and the true warps of its patches.

Legend: F frames, N pairs, P patches of a frame, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastmum.data.errors import DataError
from fastmum.evaluate.pairs import Frame, PairSet, pair_warp
from fastmum.features import FeatureCache, Tokens, image_key
from fastmum.features.cache import half
from fastmum.features.images import Placement
from fastmum.model.encoder import Encoder
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastmum.model.options import normalise
from fastmum.progress import progress_bar

Norm = Literal["layernorm", "raw"]
NORMS: tuple[Norm, ...] = ("layernorm", "raw")
BATCH = 8  # frames encoded at once
WHOLE = Placement(0, 0, 0, 0)  # of cached features: pictures are resized, so nothing is padding
STORED = torch.float16  # of cached features: half the memory, a relative error of at most 0.05 %


@dataclass(frozen=True)
class Truth:
    """True warps of a pair set, on the CPU."""

    pairs: PairSet
    target: Tensor  # (N, P, 2) unit coordinates in B of the cell centres of A, float64; of pixels float32
    visible: Tensor  # (N, P) bool, where the true warp exists
    grid: tuple[int, int]  # rows and columns of cells: patches or pixels


@dataclass(frozen=True)
class Prepared:
    """Features and true warps of a pair set, on the CPU.

    By default each token is divided by its root mean square, which a cosine does not see and without which float16
    could overflow.
    """

    truth: Truth
    features: Tensor  # (F, P, D) of the distinct frames
    first: Tensor  # (N,) int64, index of the frame A of each pair
    second: Tensor

    def of(self, pairs: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features of A and B of the pairs (B,) on a device, (B, P, D) float32 each."""
        a, b = (self.features[frames[pairs]].to(device, torch.float32) for frames in (self.first, self.second))
        return a, b


def prepare(
    encoder: nn.Module, pairs: PairSet, size: int | None = None, norms: Sequence[Norm] = NORMS,
    cache: Path | None = None, scaled: bool = True,
) -> dict[Norm, Prepared]:  # fmt: skip
    """Encode the frames of a set, each once, by `patch_features`, and compute its true warps.

    `size` is the side of the resized pictures in pixels, by default that of the set. With the folder `cache`, features
    are read from there if an earlier call wrote them. Unless `scaled`, tokens keep their length (a probe with a bias
    sees it). DataError: an unreadable frame, a size that does not fit, features that are not finite, or no visible
    point.
    """
    size = check_size(encoder, size or pairs.size)
    by_key = {frame.key: frame for pair in pairs.pairs for frame in (pair.a, pair.b)}
    frames, index = list(by_key.values()), {key: i for i, key in enumerate(by_key)}
    about = {"norms": list(norms), "scale": "root mean square" if scaled else "none", "dtype": str(STORED)}
    kept = None if cache is None else FeatureCache(cache, cast(Encoder, encoder), about)
    encoded: list[Tensor] = []
    for start in progress_bar(range(0, len(frames), BATCH), desc=f"encoding {pairs.name}", leave=False):
        images = torch.stack([load_image(frame, size) for frame in frames[start : start + BATCH]])
        if kept is None:
            encoded.append(_stored(encoder, images, norms, pairs, scaled))
            continue

        def compute(missing: list[int], images: Tensor = images) -> list[Tokens]:
            return [Tokens(None, x, WHOLE) for x in _stored(encoder, images[missing], norms, pairs, scaled)]

        found = kept.tokens([image_key(image) for image in images], compute)
        encoded.append(torch.stack([tokens.patch for tokens in found]))
    truth = true_warps(pairs, size // patch_size(encoder))
    first, second = torch.tensor([(index[pair.a.key], index[pair.b.key]) for pair in pairs.pairs]).T
    features = torch.cat(encoded)
    return {norm: Prepared(truth, features[:, i], first, second) for i, norm in enumerate(norms)}


def _stored(encoder: nn.Module, images: Tensor, norms: Sequence[Norm], pairs: PairSet, scaled: bool) -> Tensor:
    """Features of frames for each norm, (F, n, P, D), as in `Prepared`."""
    found, stored = patch_features(encoder, images), []
    for norm in norms:
        check_finite(found[norm], pairs)
        scale = found[norm].square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30) if scaled else 1.0
        stored.append(half(found[norm] / scale))
    return torch.stack(stored, dim=1)


def true_warps(pairs: PairSet, side: int, dtype: torch.dtype = torch.float64) -> Truth:
    """True warps at the centres of side x side cells; a `DataError` if no point is visible in any pair."""
    bar = progress_bar(pairs.pairs, desc="true warps", unit="pair", leave=False)
    warps = (pair_warp(pair, side, side) for pair in bar)
    points, seen = zip(*((warp.points.to(dtype), warp.visible) for warp in warps), strict=True)
    visible = torch.stack(seen)
    if not visible.any():
        raise DataError(f"no point of the set '{pairs.name}' is visible in both views: are K, T_b_a and depth right?")
    return Truth(pairs, torch.stack(points), visible, (side, side))


def check_finite(computed: Tensor, pairs: PairSet) -> None:
    """Raise a `DataError` unless all features of a set are finite."""
    if not computed.isfinite().all():
        raise DataError(f"features of the set '{pairs.name}' are not finite: are the weights damaged?")


def load_image(frame: Frame, size: int) -> Tensor:
    """The picture of a frame resized to a square, as in RoMa, (size, size, 3) uint8; raises `DataError`."""
    image = frame.read_image()
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


@torch.no_grad()
def patch_features(encoder: nn.Module, images: Tensor) -> dict[Norm, Tensor]:
    """Last-layer patch features of whole pictures (F, H, W, 3) uint8, computed on the encoder's device.

    The encoder has `forward_features` with DINOv2's keys "x_norm_patchtokens" and "x_prenorm". The features (F, P, D),
    float32, are "layernorm" after the encoder's last norm, "raw" before it. Pictures are normalised by the encoder's
    `mean` and `std`, by ImageNet's if it has none.
    """
    device = next(encoder.parameters()).device
    mean, std = getattr(encoder, "mean", IMAGENET_MEAN), getattr(encoder, "std", IMAGENET_STD)
    normalised = normalise(images.to(device).permute(0, 3, 1, 2).float() / 255, mean, std)
    features = encoder.forward_features(normalised)  # type: ignore[operator]
    patches = features["x_norm_patchtokens"]
    # CLS, and registers if there are any, come first.
    return {"layernorm": patches.float(), "raw": features["x_prenorm"][:, -patches.shape[1] :].float()}


def patch_size(encoder: Any) -> int:
    """Side of the encoder's patches in pixels."""
    own = getattr(encoder, "patch_size", None)
    return encoder.config.patch_size if own is None else own


def check_size(encoder: nn.Module, size: int) -> int:
    """Return the size of pictures; raise a `DataError` if the encoder's patch size does not divide it."""
    if size < 1 or size % patch_size(encoder):
        raise DataError(f"--size is {size}, but must be a positive multiple of the patch size {patch_size(encoder)}")
    return size

"""Trained runs for inference: warps of two images in both directions, and matches sampled from them."""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.data.pair_loader import square_view
from fastmum.engine.device import autocast, pick_precision
from fastmum.geometry import View
from fastmum.model.encoder import Encoder
from fastmum.tasks.roma.coarse import grid
from fastmum.tasks.roma.config import RomaSection
from fastmum.tasks.roma.decoder import COARSE, STRIDES
from fastmum.tasks.roma.model import Roma, sides
from fastmum.tasks.trained import Trained, load_trained

FINE = 864 / 560  # size of the second pass over that of the training images
ATTENUATION = 0.5  # of the coarse certainty where it is negative, which is subtracted
THRESHOLD = 0.05  # certainties above it count as 1
MORE = 4  # times as many samples are drawn by certainty, of which the balanced ones are chosen
SPREAD = 0.1  # standard deviation of the density, in the unit of warps
FEW = 10.0  # samples of a lower density are isolated,
ISOLATED = 1e-7  # and have this chance
CHUNK = 64  # samples whose density is computed at once, so that they stay in the cache


class Warps(NamedTuple):
    """Warps of both images of a pair, on the CPU, float32."""

    points: Tensor  # (2, H, W, 2) from the first to the second image and back, x and y in [-1, 1]
    certainty: Tensor  # (2, H, W) in [0, 1], 0 where a warp leaves the other image


def load_run(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", encoder: str | None = None
) -> Trained[Roma]:
    """Load a run; see `load_trained`."""

    def make(settings: RomaSection, loaded: Encoder) -> Roma:
        return Roma(settings.sizes(loaded.embed_dim, loaded.config.patch_size), loaded)

    return load_trained(path, "roma", RomaSection, make, 560, device, encoder)


def fine_size(size: int) -> int:
    """Side of the images of the second pass, a multiple of 16."""
    return round(FINE * size / COARSE) * COARSE


def match(
    trained: Trained[Roma], first: np.ndarray, second: np.ndarray, size: int | None = None, fine: bool = True
) -> Warps:
    """Match two images (H, W, 3) uint8 of any sizes; without `fine`, by the first pass only. See `passes`."""
    found = passes(trained, first, second, size)
    warps = next(found)
    return next(found) if fine else warps


@torch.inference_mode()
def passes(trained: Trained[Roma], first: np.ndarray, second: np.ndarray, size: int | None = None) -> Iterator[Warps]:
    """Match two images (H, W, 3) uint8 of any sizes in two passes.

    The first one is at `size` (None: that of training); the second one refines its result from stride 8 on at 864 / 560
    of the size, without the frozen encoder.
    """
    model, trained_size = trained.model, trained.image_size
    size = size or trained_size
    device = next(model.decoder.parameters()).device

    def maps(side: int, coarse: bool) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        images = np.stack([square_view(View(image), (side, side)).image for image in (first, second)])
        return sides(model.maps(torch.from_numpy(images).to(device), coarse), both=True)

    precision = pick_precision("auto", device)
    with autocast(device, precision):
        found = model.decoder(*maps(size, coarse=True), scale_factor=size / trained_size)
    flow, certainty, low = found[1].flow, found[1].certainty, found[COARSE].certainty
    yield _warps(flow, certainty, low)
    side = fine_size(size)
    with autocast(device, precision):
        found = model.decoder(*maps(side, coarse=False), (flow, certainty), side / trained_size, STRIDES[1:])
    yield _warps(found[1].flow, found[1].certainty, low)


def _warps(flow: Tensor, certainty: Tensor, low: Tensor) -> Warps:
    """Warps of the decoder's outputs (2, 2, H, W) and logits (2, 1, H, W), and the coarse logits `low`."""
    low = F.interpolate(low, certainty.shape[2:], mode="bilinear", align_corners=False)
    certainty = (certainty - ATTENUATION * low.clamp(max=0)).sigmoid()[:, 0]
    certainty = torch.where((flow.abs() > 1).any(1), 0, certainty)
    return Warps(flow.clamp(-1, 1).permute(0, 2, 3, 1).cpu(), certainty.nan_to_num(0).cpu())


def correspondences(warps: Warps) -> tuple[Tensor, Tensor]:
    """All matches of both directions, (2 H W, 4): x, y in the first and in the second image; certainty (2 H W,)."""
    H, W = warps.certainty.shape[1:]
    own = grid((H, W))[0].permute(1, 2, 0)
    forth, back = torch.cat([own, warps.points[0]], -1), torch.cat([warps.points[1], own], -1)
    return torch.cat([forth.view(-1, 4), back.view(-1, 4)]), warps.certainty.reshape(-1)


def sample(warps: Warps, count: int, generator: torch.Generator, threshold: float = THRESHOLD) -> tuple[Tensor, Tensor]:
    """At most `count` matches (n, 4) and their certainties (n,), drawn by certainty and balanced by density (RoMa).

    None, if the certainty is 0 everywhere. `generator` is one of the CPU.
    """
    matches, certainty = correspondences(warps)
    chances = torch.where(certainty > threshold, 1.0, certainty)
    drawn = _draw(chances, MORE * count, generator)
    matches, certainty = matches[drawn], certainty[drawn]
    density = _density(matches)
    balanced = torch.where(density < FEW, ISOLATED, 1 / (density + 1))
    kept = _draw(balanced, count, generator)
    return matches[kept], certainty[kept]


def _draw(chances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of at most `count` items without replacement, by the smallest exponential times over chances."""
    times = torch.empty_like(chances).exponential_(generator=generator) / chances
    possible = int((chances > 0).sum())
    return times.topk(min(count, possible), largest=False).indices


def _density(points: Tensor) -> Tensor:
    """Sums of Gaussian kernels (n,) at points (n, 4); their exponents, -|x - y|^2 / 2, are products of vectors."""
    x = points / SPREAD
    half, one = -x.square().sum(1, keepdim=True) / 2, torch.ones_like(x[:, :1])
    every = torch.cat([x, one, half], 1).T
    parts = torch.cat([x, half, one], 1).split(CHUNK)
    return torch.cat([(part @ every).exp_().sum(1) for part in parts])


def pixels(points: Tensor, size: Sequence[float]) -> np.ndarray:
    """Points (..., 2) in [-1, 1] in pixels of an image of `size` (width, height), float64; centres are at +0.5.

    Or matches (..., 4); `size` is then width and height of the first image, and of the second.
    """
    return ((points.double().numpy() + 1) / 2) * np.array(size, np.float64)

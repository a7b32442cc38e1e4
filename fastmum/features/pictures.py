"""Pictures of features: an image beside its patch tokens, whose three main directions are red, green and blue.

The directions are those of all images together, so that what has one colour in two of them has like features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastmum.data.decode.image import FrameError
from fastmum.features.errors import FeaturesError
from fastmum.features.extract import Tokens
from fastmum.features.images import Images, Placement, read_image

COLOURS = 3
SAMPLES = 100_000  # tokens that the directions are computed from
SPREAD = (0.01, 0.99)  # quantiles that become black and full colour
GAP = 4  # pixels between the two


class Basis(NamedTuple):
    """What turns tokens into colours.

    Args:
        mean: (D,) of tokens.
        directions: (D, 3), orthonormal.
        low, high: (3,) values along them that become 0 and 1.
    """

    mean: Tensor
    directions: Tensor
    low: Tensor
    high: Tensor

    def colours(self, patch: Tensor) -> np.ndarray:
        """Tokens (..., D) -> (..., 3) uint8."""
        values = (patch.float() - self.mean) @ self.directions
        shares = (values - self.low) / (self.high - self.low).clamp_min(1e-12)
        return (shares.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def fit_basis(patches: Sequence[Tensor]) -> Basis:
    """The main directions of patch tokens, (..., D) each, by principal component analysis."""
    every = -(-sum(patch[..., 0].numel() for patch in patches) // SAMPLES)
    tokens = torch.cat([patch.flatten(0, -2)[::every].float() for patch in patches])
    mean = tokens.mean(0)
    centred = tokens - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    directions = vectors[:, -COLOURS:].flip(1)
    values = centred @ directions
    # Of a direction and its opposite, the one along which values reach further.
    directions = directions * torch.where(values.amax(0) < -values.amin(0), -1.0, 1.0)
    values = (centred @ directions).numpy()
    low, high = (torch.from_numpy(np.quantile(values, q, axis=0)).float() for q in SPREAD)
    return Basis(mean, directions, low, high)


def content(tokens: Tokens, patch_size: int) -> Tensor:
    """Patch tokens as a map (rows, columns, D), of several layers the last, without those that see padding alone."""
    place = tokens.placement
    patch = tokens.patch if tokens.patch.ndim == 2 else tokens.patch[-1]
    grid = patch.unflatten(0, (place.height // patch_size, place.width // patch_size))
    return grid[: -(-place.content_height // patch_size), : -(-place.content_width // patch_size)]


def draw(image: np.ndarray, patch: Tensor, placement: Placement, basis: Basis, patch_size: int) -> Image.Image:
    """An image (H, W, 3) uint8 as the encoder saw it beside its map of tokens (rows, columns, D), without padding."""
    height, width = placement.content_height, placement.content_width
    colours = basis.colours(patch).repeat(patch_size, 0).repeat(patch_size, 1)
    gap = np.full((height, GAP, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([image[:height, :width], gap, colours[:height, :width]], axis=1))


def write_pictures(
    folder: Path, images: Images, features: Mapping[str, Tokens], patch_size: int, progress: bool = False
) -> None:
    """Draw a picture of every image.

    Raises:
        FeaturesError: they cannot be written.
    """
    maps = {name: content(tokens, patch_size) for name, tokens in features.items()}
    basis = fit_basis(list(maps.values()))
    files = {images.name(file): file for file in images.files}
    names = _file_names(maps)
    for name, patch in tqdm(maps.items(), unit="image", desc="pictures", disable=not progress):
        placement = features[name].placement
        try:
            picture = draw(read_image(files[name], placement), patch, placement, basis, patch_size)
            (folder / names[name]).parent.mkdir(parents=True, exist_ok=True)
            picture.save(folder / names[name])
        except (OSError, FrameError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FeaturesError(f"the picture '{folder / names[name]}' cannot be written ({reason})") from error


def _file_names(names: Iterable[str]) -> dict[str, str]:
    """a.jpg becomes a.png, or a.jpg.png where there is another a."""
    names = list(names)
    short = [str(Path(name).with_suffix(".png")) for name in names]
    return {name: s if short.count(s) == 1 else f"{name}.png" for name, s in zip(names, short, strict=True)}

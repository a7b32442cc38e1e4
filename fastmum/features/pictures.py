"""An image next to its patch tokens, with the three main directions of the tokens as red, green and blue.

The directions are common to all images, so that equal colours are similar features.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmum.data.decode.image import FrameError
from fastmum.errors import writing
from fastmum.features.images import FeaturesError, Images, read_image
from fastmum.features.store import Tokens
from fastmum.progress import progress_bar

SAMPLES = 100_000  # tokens that the directions are computed from
SPREAD = (0.01, 0.99)  # quantiles that become 0 and full intensity
GAP = 4  # pixels between image and tokens


def fit_colours(patches: Sequence[Tensor]) -> Callable[[Tensor], np.ndarray]:
    """A map from tokens (..., D) to colours (..., 3) uint8, by the principal components of all `patches` (..., D)."""
    every = -(-sum(patch[..., 0].numel() for patch in patches) // SAMPLES)
    tokens = torch.cat([patch.flatten(0, -2)[::every].float() for patch in patches])
    mean = tokens.mean(0)
    centred = tokens - mean
    directions = torch.linalg.eigh(centred.T @ centred)[1][:, -3:].flip(1)  # eigenvalues ascend
    values = centred @ directions
    signs = torch.where(values.amax(0) < -values.amin(0), -1.0, 1.0)  # so that the longer tail is positive
    directions = directions * signs
    low, high = (torch.from_numpy(np.quantile((values * signs).numpy(), q, axis=0)).float() for q in SPREAD)

    def colours(patch: Tensor) -> np.ndarray:
        share = ((patch.float() - mean) @ directions - low) / (high - low).clamp_min(1e-12)
        return (share.clamp(0, 1) * 255).round().to(torch.uint8).numpy()

    return colours


def content(tokens: Tokens, patch_size: int) -> Tensor:
    """Patch tokens of the last layer as a map (rows, columns, D), without patches that contain only padding."""
    place = tokens.placement
    patch = tokens.patch if tokens.patch.ndim == 2 else tokens.patch[-1]
    grid = patch.unflatten(0, (place.height // patch_size, place.width // patch_size))
    return grid[: -(-place.content_height // patch_size), : -(-place.content_width // patch_size)]


def write_pictures(folder: Path, images: Images, features: Mapping[str, Tokens], patch_size: int) -> None:
    """Draw each image as the encoder saw it, without padding, next to its tokens."""
    maps = {name: content(tokens, patch_size) for name, tokens in features.items()}
    colours = fit_colours(list(maps.values()))
    files, pictures = {images.name(file): file for file in images.files}, _file_names(maps)
    for name, patch in progress_bar(maps.items(), unit="image", desc="pictures"):
        place, file = features[name].placement, folder / pictures[name]
        height, width = place.content_height, place.content_width
        drawn = colours(patch).repeat(patch_size, 0).repeat(patch_size, 1)[:height, :width]
        gap = np.full((height, GAP, 3), 255, np.uint8)
        with writing(file, FeaturesError, FrameError):
            image = read_image(files[name], place)[:height, :width]
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.concatenate([image, gap, drawn], axis=1)).save(file)


def _file_names(names: Iterable[str]) -> dict[str, str]:
    """a.jpg becomes a.png, or a.jpg.png if there is another image a."""
    names = list(names)
    short = [str(Path(name).with_suffix(".png")) for name in names]
    return {name: s if short.count(s) == 1 else f"{name}.png" for name, s in zip(names, short, strict=True)}

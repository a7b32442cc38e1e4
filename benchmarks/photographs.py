"""JPEG files to decode, of the sizes of thumbnails, video and cameras."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "scenes"


def small_files(folder: Path, count: int = 192) -> list[Path]:
    """JPEGs with a short side of about 320 pixels: the project's test data, or else skimage's photographs."""
    shared = sorted(SHARED.glob("*/*.jpg"))
    if shared:
        return [shared[i * len(shared) // count] for i in range(count)]
    return _save(folder / "small", (427, 320), count, quality=92)


def large_files(folder: Path, size: tuple[int, int], count: int = 24) -> list[Path]:
    """JPEGs of a given size: skimage's photographs, enlarged and with camera noise; 0.5 MB at 1920 x 1080."""
    return _save(folder / f"{size[0]}x{size[1]}", size, count, quality=90)


def _save(folder: Path, size: tuple[int, int], count: int, quality: int) -> list[Path]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    photographs = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    files = []
    for i in range(count):
        image = Image.fromarray(photographs[i % len(photographs)])
        width, height = _fit(image.size, size, share=rng.uniform(0.7, 1.0))
        left, top = rng.integers((image.width - width + 1, image.height - height + 1)).tolist()
        box = (left, top, left + width, top + height)
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box), np.float32)
        grain = rng.normal(0, 4, (*pixels.shape[:2], 1)) + rng.normal(0, 2, pixels.shape)  # grey and coloured
        files.append(folder / f"{i:03d}.jpg")
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(files[-1], quality=quality)
    return files


def _fit(image: tuple[int, int], size: tuple[int, int], share: float) -> tuple[int, int]:
    """A share of the largest box with the aspect ratio of `size` in an image."""
    scale = share * min(image[0] / size[0], image[1] / size[1])
    return int(size[0] * scale), int(size[1] * scale)

"""Photographs from scikit-image's wheel and fractal noise fields, loaded once a process.

Shapes: C = 3 colours first, so that numpy's inner loop runs along a row: P_CHW float32 in 0..1 (display space, gamma
about 2); fields [FIELD, FIELD] float32, periodic, zero mean, unit deviation.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

FIELD = 1024  # side of a noise field; a power of two, so that a bit mask wraps an index

# Photographs that read as pictures (hung on a wall, printed on a crate), and photographs of plain matter.
COLOURED = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "ihc.png",
)
GREY = ("camera.png", "moon.png", "cell.png", "coins.png", "page.png", "text.png")
MATTER = ("brick.png", "grass.png", "gravel.png")


def photo_folder() -> Path:
    """The folder of scikit-image's own data files; FileNotFoundError if the package or a file is missing."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the embedded scenes need scikit-image's photographs: pip install scikit-image")
    folder = Path(spec.origin).parent / "data"
    missing = [name for name in (*COLOURED, *GREY, *MATTER) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: reinstall scikit-image from its wheel")
    return folder


@cache
def photo(name: str) -> Image.Image:
    """One photograph, RGB, at most 640 px a side, its levels stretched so that none is dull and none is black."""
    image = Image.open(photo_folder() / name).convert("RGB")
    image.thumbnail((640, 640), Image.Resampling.BOX)
    rgb = np.asarray(image, dtype=np.float32)
    low, high = np.percentile(rgb, (1.0, 99.0))
    stretched = np.clip((rgb - low) / (high - low), 0.0, 1.0) * 210.0 + 22.0
    return Image.fromarray(stretched.astype(np.uint8))


def planes(image: Image.Image) -> np.ndarray:
    """An RGB image as [3, H, W] float32 in 0..1."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1), dtype=np.float32) * np.float32(1 / 255)


def _spectral_field(seed: int, slope: float, stretch: float, lowest: float) -> np.ndarray:
    """Gaussian noise whose amplitude falls as frequency**-slope, stretched along x, nothing below `lowest` cycles."""
    white = np.random.default_rng([91, seed]).standard_normal((FIELD, FIELD), dtype=np.float32)
    fy = np.fft.fftfreq(FIELD)[:, None] * FIELD
    fx = np.fft.rfftfreq(FIELD)[None, :] * (FIELD * stretch)
    frequency = np.sqrt(fx * fx + fy * fy)
    gain = np.where(frequency >= lowest, np.maximum(frequency, 1.0) ** -slope, 0.0)
    noise = np.fft.irfft2(np.fft.rfft2(white) * gain, s=(FIELD, FIELD))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


@cache
def field(kind: str) -> np.ndarray:
    """A periodic noise field [FIELD, FIELD]: "rough" and "cloud" are isotropic, "grain" runs along x."""
    seed, slope, stretch, lowest = {"rough": (1, 1.1, 1, 5), "cloud": (2, 1.9, 1, 1.5), "grain": (3, 1.2, 14, 8)}[kind]
    return _spectral_field(seed, slope, stretch, lowest)

"""A decoder that reads files the simple way, to hold the others against, and photographs to read."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageOps

from fastmum.data.crops import crop_box, draw_crops
from fastmum.data.decode import make_decoder


@pytest.fixture(params=["pillow", "dali_cpu"])
def decoder_name(request) -> str:
    """Every decoder that runs here."""
    if request.param == "dali_cpu":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return request.param


@pytest.fixture
def decoder(decoder_name):
    """Frames of 64 pixels."""
    return make_decoder(decoder_name, 64)


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """A photograph of 200 x 150 pixels."""
    return Image.fromarray(skimage.data.astronaut()).resize((200, 150), box=(0, 0, 512, 384))


@pytest.fixture
def draw():
    """Crops and flips for a number of files."""

    def of(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        return draw_crops(rng, count, (0.2, 1.0), (3 / 4, 4 / 3)), rng.random(count) < 0.5

    return of


@pytest.fixture
def plainly():
    """Read the whole file, turn it, crop, resize, flip: Pillow alone, no shortcut."""

    def read(file, crop, flip, size=64) -> torch.Tensor:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
            image = image.convert("RGB")
        frame = image.crop(crop_box(crop, *image.size)).resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(ImageOps.mirror(frame) if flip else frame))

    return read


@pytest.fixture
def distance():
    """Mean difference in grey levels."""
    return lambda a, b: (a.int() - b.int()).abs().float().mean().item()

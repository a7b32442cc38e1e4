"""A plain Pillow decoder as the reference, and a photograph."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageOps

from fastmum.data.decode import make_decoder
from fastmum.data.decode.image import crop_box, draw_crops


@pytest.fixture(params=["pillow", "dali_cpu"])
def decoder(request):
    """Every decoder that runs on a CPU, for frames of 64 pixels."""
    if request.param == "dali_cpu":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return make_decoder(request.param, 64)


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """A photograph of 200 x 150 pixels."""
    return Image.fromarray(skimage.data.astronaut()).resize((200, 150), box=(0, 0, 512, 384))


def draw_for(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return draw_crops(rng, count, (0.2, 1.0), (3 / 4, 4 / 3)), rng.random(count) < 0.5


@pytest.fixture
def draw():
    """Crops and flips for a number of files."""
    return draw_for


def read_plainly(file, crop, flip, size=64) -> torch.Tensor:
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
        image = image.convert("RGB")
    frame = image.crop(crop_box(crop, *image.size)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(ImageOps.mirror(frame) if flip else frame))


def grey_levels(a, b) -> float:
    return (a.int() - b.int()).abs().float().mean().item()


@pytest.fixture
def distance():
    """Mean difference in grey levels."""
    return grey_levels


@pytest.fixture
def check():
    """Decode files and compare every frame with the reference: read, turn, crop, resize, flip the whole file."""

    def check(decoder, files, tolerance=0.5, seed=0):
        crops, flips = draw_for(len(files), seed)
        frames, bad = decoder.decode(files, crops, flips)
        assert not bad
        assert (frames.shape, frames.dtype) == ((len(files), decoder.size, decoder.size, 3), torch.uint8)
        for file, frame, crop, flip in zip(files, frames, crops, flips, strict=True):
            assert grey_levels(frame, read_plainly(file, crop, flip, decoder.size)) < tolerance, file.name
        return frames

    return check

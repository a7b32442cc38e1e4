"""A plain Pillow decoder as the reference, and a photograph."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageOps

from fastmum.data.decode import make_decoder
from fastmum.data.decode.image import ORIENTATION, crop_box, draw_crops


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


@pytest.fixture
def save(tmp_path, photograph):
    """Writes a file of an image, by default the photograph."""

    def save(name, image=photograph, orientation=None, **options):
        exif = Image.Exif()
        if orientation:
            exif[ORIENTATION] = orientation
        image.save(tmp_path / name, **{"exif": exif} | options)
        return tmp_path / name

    return save


@pytest.fixture
def draw():
    """Crops and flips for a number of files."""

    def draw(count):
        rng = np.random.default_rng(0)
        return draw_crops(rng, count, (0.2, 1.0), (3 / 4, 4 / 3)), rng.random(count) < 0.5

    return draw


@pytest.fixture
def distance():
    """Mean difference in grey levels."""
    return lambda a, b: (a.int() - b.int()).abs().float().mean().item()


@pytest.fixture
def check(draw, distance):
    """Decode files and compare every frame with the reference: read, turn, crop, resize, flip the whole file."""

    def check(decoder, files, tolerance=0.5):
        crops, flips = draw(len(files))
        frames, bad = decoder.decode(files, crops, flips)
        assert not bad
        assert (frames.shape, frames.dtype) == ((len(files), decoder.size, decoder.size, 3), torch.uint8)
        for file, frame, crop, flip in zip(files, frames, crops, flips, strict=True):
            with Image.open(file) as image:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
            image = image.convert("RGB").crop(crop_box(crop, *image.size))
            plain = image.resize((decoder.size, decoder.size), Image.Resampling.BICUBIC)
            plain = torch.from_numpy(np.array(ImageOps.mirror(plain) if flip else plain))
            assert distance(frame, plain) < tolerance, file.name
        return frames

    return check

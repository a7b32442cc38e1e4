"""Orientation, scaled decoding and the cache."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastmum.data import decode
from fastmum.data.decode import PillowDecoder
from fastmum.data.decode.image import KEPT, ORIENTATION, jpeg_scale, place, stored_box, whole_frames

SIZE = 32


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_of_the_file_turned_upright_is_the_box_of_the_upright_image(orientation):
    stored = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    image = Image.fromarray(stored)
    image.getexif()[ORIENTATION] = orientation
    whole = ImageOps.exif_transpose(image)
    box = (1, 2, 6, 5)
    left, top, right, bottom = stored_box(box, orientation, *whole.size)
    for flip in (False, True):
        theirs = np.asarray(ImageOps.mirror(whole.crop(box)) if flip else whole.crop(box))
        ours = np.empty_like(theirs)
        place(stored[top:bottom, left:right], ours, orientation, flip)
        assert np.array_equal(ours, theirs)


@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000), size=st.integers(1, 1024))
def test_scaled_decoding_keeps_pixels_for_the_frame(width, height, size):
    scale = jpeg_scale(width, height, size)
    assert scale in (1, 2, 4, 8)
    assert scale == 1 or min(width, height) / scale >= KEPT * size
    assert scale == 8 or min(width, height) / (2 * scale) < KEPT * size, "a smaller one would do"


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that were read, in order."""
    files = []
    read = decode.read_file
    monkeypatch.setattr(decode, "read_file", lambda file: files.append(file.name) or read(file))
    return files


def test_images_that_fit_are_read_once_and_nothing_else_changes(tmp_path, photograph, reads, draw):
    files = [tmp_path / f"{i}.png" for i in range(6)]
    for i, file in enumerate(files):
        exif = Image.Exif()
        exif[ORIENTATION] = 1 + i
        photograph.rotate(10 * i).save(file, exif=exif)
    one_image = 3 * photograph.width * photograph.height
    crops, flips = draw(6)
    plain = PillowDecoder(SIZE).decode(files, crops, flips).frames
    for room, expected in ((10 * one_image, 6), (2 * one_image + 1, 6 + 4), (one_image - 1, 12)):
        decoder = PillowDecoder(SIZE, cache_bytes=room)
        reads.clear()
        for _ in range(2):
            assert torch.equal(decoder.decode(files, crops, flips).frames, plain)
        assert len(reads) == expected


def test_jpegs_that_may_be_decoded_scaled_are_not_cached(tmp_path, photograph, reads):
    """A frame must not depend on what was decoded before."""
    photograph.save(tmp_path / "large.jpg")
    photograph.resize((4 * SIZE - 1, 4 * SIZE)).save(tmp_path / "small.jpg")
    decoder = PillowDecoder(SIZE, cache_bytes=10**9)
    for _ in range(3):
        decoder.decode([tmp_path / "large.jpg", tmp_path / "small.jpg"], whole_frames(2), np.zeros(2, bool))
    assert reads.count("large.jpg") == 3
    assert reads.count("small.jpg") == 1

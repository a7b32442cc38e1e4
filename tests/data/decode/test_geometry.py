"""Boxes and frames of rotated files, and scaled decoding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastmum.data.decode.image import KEPT, ORIENTATION, jpeg_scale, place, stored_box


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("flip", [False, True])
def test_a_box_of_the_file_turned_upright_is_the_box_of_the_upright_image(orientation, flip):
    stored = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    image = Image.fromarray(stored)
    image.getexif()[ORIENTATION] = orientation
    whole = ImageOps.exif_transpose(image)
    assert (whole.size == (7, 11)) == (orientation >= 5)

    box = (1, 2, 6, 5)
    left, top, right, bottom = stored_box(box, orientation, *whole.size)
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

"""The photographs of predictions of pairs."""

from pathlib import Path

import numpy as np

from fastmum.data.decode.image import FrameError, read_upright
from fastmum.errors import FastmumError

ONE_COLOUR = "of one colour, which shows no geometry"


def one_colour(image: np.ndarray) -> bool:
    """Whether all pixels of an image (H, W, 3) are the same."""
    return bool((image == image[0, 0]).all())


def read_photo(file: Path) -> np.ndarray:
    """An upright image (H, W, 3) uint8; FastmumError: it cannot be read, or all of its pixels are of one colour."""
    try:
        image = read_upright(file)
    except FrameError as error:
        raise FastmumError(f"'{file}' cannot be read: {error}") from None
    if one_colour(image):
        raise FastmumError(f"'{file}' is {ONE_COLOUR}; name another image")
    return image

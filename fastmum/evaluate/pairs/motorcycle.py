"""The Middlebury 2014 stereo pair "Motorcycle" that comes with scikit-image: a real photograph with measured disparity.

Calibration of the pictures at a quarter of their size: documentation of `skimage.data.stereo_motorcycle`.
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np
from PIL import Image

from fastmum.data.errors import DataError
from fastmum.evaluate.pairs import scenes
from fastmum.evaluate.pairs.pair import Camera, Frame, Pair, PairSet, unit_camera
from fastmum.evaluate.pairs.reading import clean_depth

FOCAL = 994.978  # pixels
CENTRE_X, CENTRE_Y = 311.193, 254.877  # pixels, left camera, first pixel's centre at 0
OFFSET = 31.086  # pixels that the right camera's principal point lies further right
BASELINE = 0.193001  # metres
SIZE = 448


def stereo(part: str) -> PairSet:
    """The pair; one pair leaves nothing to train on, so training pairs are those of the rendered scenes.

    Args:
        part: "train", or "test" and "all", which here are the same.

    Raises:
        DataError: scikit-image or its data is missing.
    """
    if part == "train":
        return scenes.embedded("train")
    _read()  # says at once if it is not there
    left, right = (Frame(side, partial(_image, i), partial(_camera, i)) for i, side in enumerate(("left", "right")))
    T = np.eye(4)
    T[0, 3] = -BASELINE
    return PairSet("motorcycle", [Pair("motorcycle", "motorcycle", left, right, T)], SIZE)


@cache
def _read() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        from skimage.data import stereo_motorcycle

        return stereo_motorcycle()
    except Exception as error:  # missing package, missing file, or no network to fetch it from
        raise DataError(f"scikit-image's motorcycle pair cannot be read ({error}): pip install scikit-image") from None


def _image(side: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(_read()[side][..., :3]))


def _camera(side: int) -> Camera:
    disparity = _read()[2]
    height, width = disparity.shape
    shown = disparity if side == 0 else _seen_from_right(disparity)
    depth = clean_depth(FOCAL * BASELINE / (shown + OFFSET))
    K = np.array([[FOCAL, 0, CENTRE_X + side * OFFSET + 0.5], [0, FOCAL, CENTRE_Y + 0.5], [0, 0, 1]])
    return unit_camera(K, (width, height), depth)


def _seen_from_right(disparity: np.ndarray) -> np.ndarray:
    """Disparity of the right picture's pixels, NaN where no pixel of the left lands: the nearer one hides the other."""
    rows, columns = np.nonzero(np.isfinite(disparity))
    values = disparity[rows, columns]
    landed = np.rint(columns - values).astype(int)
    inside = landed >= 0
    right = np.full(disparity.shape, -np.inf, np.float32)
    np.maximum.at(right, (rows[inside], landed[inside]), values[inside])
    return np.where(np.isfinite(right), right, np.nan)

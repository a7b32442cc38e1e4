"""Random crops, drawn before anybody knows how large the image is.

The distribution is that of torchvision's `RandomResizedCrop` (the augmentation of the released code): up to ten
attempts at an area and an aspect ratio, the first that fits in the image is placed at random, and if none fits the
largest box in the middle is taken whose aspect ratio lies within bounds. A crop is a row of numbers, so that it can
travel with a plan to any decoder; `crop_boxes` is the one place that makes pixels of it.
"""

from __future__ import annotations

import numpy as np

ATTEMPTS = 10  # torchvision's
# Columns of a crop.
AREAS = slice(0, ATTEMPTS)  # share of the image's area
ASPECTS = slice(ATTEMPTS, 2 * ATTEMPTS)  # width over height
CORNER = slice(2 * ATTEMPTS, 2 * ATTEMPTS + 2)  # where in the room that is left, x and y, each in [0, 1)
BOUNDS = slice(2 * ATTEMPTS + 2, 2 * ATTEMPTS + 4)  # least and greatest aspect ratio, where no attempt fits
CROP_WIDTH = 2 * ATTEMPTS + 4


def draw_crops(
    rng: np.random.Generator, count: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> np.ndarray:
    """Draw crops, (count, CROP_WIDTH) float32.

    Args:
        rng: source of the draws.
        count: crops to draw.
        scale: range of the area, as a share of the image's, uniform.
        aspect: range of width over height, uniform in its logarithm.
    """
    crops = rng.random((count, CROP_WIDTH), dtype=np.float32)  # in float32 from the start: rounding could give 1.0
    crops[:, AREAS] = scale[0] + (scale[1] - scale[0]) * crops[:, AREAS]
    low, high = np.log(aspect)
    crops[:, ASPECTS] = np.exp(low + (high - low) * crops[:, ASPECTS])
    crops[:, BOUNDS] = aspect
    return crops


def whole_frames(count: int) -> np.ndarray:
    """Crops that keep the largest square in the middle, for evaluation; (count, CROP_WIDTH) float32."""
    crops = np.ones((count, CROP_WIDTH), np.float32)
    crops[:, CORNER] = 0
    return crops


def crop_boxes(crops: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes in pixels, (F, 4) int64: left, top, right, bottom, of at least one pixel and within the image.

    Args:
        crops: (F, CROP_WIDTH).
        sizes: (F, 2) widths and heights of the images, upright, in pixels.
    """
    crops = np.asarray(crops, np.float64)
    sizes = np.asarray(sizes, np.float64)
    side = np.sqrt(sizes.prod(1)[:, None] * crops[:, AREAS])
    stretch = np.sqrt(crops[:, ASPECTS])
    attempts = np.rint(np.stack([side * stretch, side / stretch], axis=2))  # (F, attempts, 2)
    fits = ((attempts >= 1) & (attempts <= sizes[:, None])).all(2)
    first = fits.argmax(1)
    boxes = attempts[np.arange(len(crops)), first]
    corners = np.floor(crops[:, CORNER] * (sizes - boxes + 1))

    none = ~fits.any(1)
    if none.any():
        boxes[none] = _largest_boxes(sizes[none], crops[none, BOUNDS])
        corners[none] = (sizes[none] - boxes[none]) // 2
    return np.concatenate([corners, corners + boxes], axis=1).astype(np.int64)


def crop_box(crop: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """`crop_boxes` of one crop (CROP_WIDTH,) in an image of `width` x `height` pixels."""
    left, top, right, bottom = crop_boxes(np.asarray(crop)[None], np.array([[width, height]]))[0].tolist()
    return left, top, right, bottom


def _largest_boxes(sizes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    widths, heights = sizes.T
    low, high = bounds.T
    boxes = np.stack([np.minimum(widths, np.rint(heights * high)), np.minimum(heights, np.rint(widths / low))], axis=1)
    return np.maximum(boxes, 1)

"""Random crops, drawn before the image size is known.

The distribution is torchvision's `RandomResizedCrop` (the augmentation of the released code): up to ten attempts at an
area and an aspect ratio; the first that fits in the image is placed at random; if none fits, the largest centred box
within the bounds of the aspect ratio. A plan holds a crop as a row of numbers, and `crop_boxes` converts it to pixels.
"""

from __future__ import annotations

import numpy as np

ATTEMPTS = 10  # torchvision
# Columns of a crop.
AREAS = slice(0, ATTEMPTS)  # share of the image's area
ASPECTS = slice(ATTEMPTS, 2 * ATTEMPTS)  # width over height
CORNER = slice(2 * ATTEMPTS, 2 * ATTEMPTS + 2)  # position within the free space, x and y, each in [0, 1)
BOUNDS = slice(2 * ATTEMPTS + 2, 2 * ATTEMPTS + 4)  # least and greatest aspect ratio, used if no attempt fits
CROP_WIDTH = 2 * ATTEMPTS + 4


def draw_crops(
    rng: np.random.Generator, count: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> np.ndarray:
    """Draw crops, (count, CROP_WIDTH) float32.

    Args:
        scale: range of the share of the image's area, uniform.
        aspect: range of width over height, log-uniform.
    """
    crops = rng.random((count, CROP_WIDTH), dtype=np.float32)  # drawn as float32: rounding a float64 could give 1.0
    crops[:, AREAS] = scale[0] + (scale[1] - scale[0]) * crops[:, AREAS]
    low, high = np.log(aspect)
    crops[:, ASPECTS] = np.exp(low + (high - low) * crops[:, ASPECTS])
    crops[:, BOUNDS] = aspect
    return crops


def whole_frames(count: int) -> np.ndarray:
    """Crops that keep the largest centred square, for evaluation; (count, CROP_WIDTH) float32."""
    crops = np.ones((count, CROP_WIDTH), np.float32)
    crops[:, CORNER] = 0
    return crops


def crop_boxes(crops: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes in pixels, (F, 4) int64: left, top, right, bottom; within the image and not empty.

    Args:
        crops: (F, CROP_WIDTH).
        sizes: (F, 2) width and height of the upright images in pixels.
    """
    crops = np.asarray(crops, np.float64)
    sizes = np.asarray(sizes, np.float64)
    side = np.sqrt(sizes.prod(1)[:, None] * crops[:, AREAS])
    stretch = np.sqrt(crops[:, ASPECTS])
    attempts = np.rint(np.stack([side * stretch, side / stretch], axis=2))  # (F, ATTEMPTS, 2)
    fits = ((attempts >= 1) & (attempts <= sizes[:, None])).all(2)
    boxes = attempts[np.arange(len(crops)), fits.argmax(1)]
    corners = np.floor(crops[:, CORNER] * (sizes - boxes + 1))

    none = ~fits.any(1)
    if none.any():
        (widths, heights), (low, high) = sizes[none].T, crops[none, BOUNDS].T
        largest = [np.minimum(widths, np.rint(heights * high)), np.minimum(heights, np.rint(widths / low))]
        boxes[none] = np.maximum(np.stack(largest, axis=1), 1)
        corners[none] = (sizes[none] - boxes[none]) // 2
    return np.concatenate([corners, corners + boxes], axis=1).astype(np.int64)


def crop_box(crop: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """`crop_boxes` of one crop (CROP_WIDTH,) in an image of `width` x `height` pixels."""
    left, top, right, bottom = crop_boxes(np.asarray(crop)[None], np.array([[width, height]]))[0].tolist()
    return left, top, right, bottom

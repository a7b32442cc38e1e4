"""Crops: torchvision's algorithm with the same draws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmum.data.decode.image import AREAS, ASPECTS, CORNER, CROP_WIDTH, crop_box, crop_boxes, draw_crops, whole_frames


def reference(crop, width, height):
    """RandomResizedCrop.get_params of torchvision, with draws that are given."""
    crop = [float(value) for value in crop]
    low, high = crop[22:24]
    for area, aspect in zip(crop[:10], crop[10:20], strict=True):
        w = round(math.sqrt(width * height * area * aspect))
        h = round(math.sqrt(width * height * area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = math.floor(crop[20] * (width - w + 1)), math.floor(crop[21] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = max(min(width, round(height * high)), 1), max(min(height, round(width / low)), 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@given(st.integers(0, 2**32), st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([(0.2, 1.0), (0.9, 1.0)]))
def test_boxes_are_those_of_torchvision(seed, width, height, scale):
    crops = draw_crops(np.random.default_rng(seed), 4, scale, (3 / 4, 4 / 3))
    boxes = crop_boxes(crops, np.array([[width, height]] * 4))
    for crop, box in zip(crops, boxes, strict=True):
        assert tuple(box) == reference(crop, width, height) == crop_box(crop, width, height)
        left, top, right, bottom = box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_draws_are_uniform():
    crops = draw_crops(np.random.default_rng(0), 20_000, (0.2, 1.0), (3 / 4, 4 / 3)).astype(float)
    assert crops.shape == (20_000, CROP_WIDTH)
    aspects = (np.log(crops[:, ASPECTS]) - math.log(3 / 4)) / math.log(16 / 9)
    for values in ((crops[:, AREAS] - 0.2) / 0.8, aspects, crops[:, CORNER]):
        histogram = np.histogram(values, bins=20, range=(-1e-6, 1 + 1e-6))[0] / values.size
        assert histogram.sum() == pytest.approx(1)
        assert np.abs(histogram - 0.05).max() < 0.004
    assert crops[:, CORNER].max() < 1
    # Over images of many shapes, by integration over the draws that fit a square.
    boxes = crop_boxes(crops, np.full((20_000, 2), 1000))
    assert np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).mean() / 1e6 == pytest.approx(0.538, abs=0.005)


def test_whole_frames_and_the_last_corner():
    """The largest square in the middle; the largest float32 below 1 as a corner, in the widest image there is."""
    boxes = crop_boxes(whole_frames(3), np.array([[300, 200], [200, 300], [64, 64]]))
    assert boxes.tolist() == [[50, 0, 250, 200], [0, 50, 200, 250], [0, 0, 64, 64]]
    crop = whole_frames(1)
    crop[:, AREAS], crop[:, CORNER] = 1e-4, np.nextafter(np.float32(1), np.float32(0))
    assert crop_box(crop[0], 60_000, 60_000) == (59_400, 59_400, 60_000, 60_000)

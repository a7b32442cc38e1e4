"""True warps against closed forms and real pictures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plane_world import WallFrame, exact, shot

from fastmum.evaluate.features import load_image
from fastmum.evaluate.pairs import Pair, open_pairs, pair_warp
from fastmum.geometry.warp import Warp, grid_points, upsample_warp, warp_image

places, angles = (st.tuples(*3 * (st.floats(-most, most),)) for most in (0.6, 0.25))


def warp_of(a: WallFrame, b: WallFrame, rows: int, columns: int) -> Warp:
    return pair_warp(Pair("", "", a, b), rows, columns)


@settings(max_examples=40, deadline=None)
@given(places, angles, st.floats(40, 90), st.integers(1, 9), st.integers(1, 9))
def test_wall_is_warped_by_its_homography(eye, turn, focal, rows, columns):
    a, b = shot((0.1, -0.1, 0.2), (0.05, -0.08, 0.1)), shot(eye, turn, (50, 70), focal)
    warp = warp_of(a.frame(), b.frame(), rows, columns)
    truth = exact(a, b, grid_points(rows, columns).numpy())
    inside = ((truth > 0.02) & (truth < 0.98)).all(1)
    assert (warp.visible.numpy() >= inside).all()
    assert not warp.visible.numpy()[((truth < 0) | (truth >= 1)).any(1)].any()
    # Depth is interpolated linearly, which on a slanted wall is right to second order in a pixel.
    error = np.abs(warp.points.numpy() - truth)[warp.visible.numpy()] * 448
    assert error.size == 0 or error.max() < 0.5


def test_what_stands_in_front_hides_and_holes_in_depth_do_not_bend_it():
    a, b = shot().frame(), shot((1.0, 0, 0)).frame()
    board = b.depth_map.copy()
    board[:, :20] = 1.0  # close to B on the left
    free, hidden = (warp_of(a, frame, 8, 8) for frame in (b, replace(b, depth_map=board)))
    left, right = free.points[:, 0] < 18 / 64, free.points[:, 0] > 22 / 64
    assert (free.visible & left).any()
    assert not (hidden.visible & left).any()
    assert torch.equal(hidden.visible[right], free.visible[right])
    blank_a, blank_b = (replace(frame, depth_map=0 * frame.depth_map) for frame in (a, b))
    assert not (warp_of(blank_a, b, 8, 8).visible | warp_of(a, blank_b, 8, 8).visible).any()
    holed = replace(a, depth_map=a.depth_map.copy())
    holed.depth_map[::2, 1::3] = 0
    whole, holes = (warp_of(frame, b, 11, 13) for frame in (a, holed))
    both = whole.visible & holes.visible
    assert both.sum() > 50
    assert torch.allclose(whole.points[both], holes.points[both], atol=1e-6)


def test_behind_the_camera_is_not_visible():
    a, beyond = shot().frame(), (0, 0, 2 * 4.0)  # beyond the wall, looking back at it, or away
    for turn, expected in (((0, np.pi, 0), True), ((0, 0, 0), False)):
        other = replace(shot(beyond, turn).frame(), depth_map=np.full_like(a.depth_map, 4.0))
        assert warp_of(a, other, 4, 4).visible.any() == expected


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.floats(-0.5, 0.5), st.floats(-0.5, 0.5))
def test_upsampling_keeps_a_shift(h, w, times, dx, dy):
    coarse, fine = ((h, w), (h * times, w * times))
    points, expected = (grid_points(*g).view(*g, 2) + torch.tensor([dx, dy]).double() for g in (coarse, fine))
    assert torch.allclose(upsample_warp(points, *fine), expected, atol=1e-6)


def test_images_warped_by_nothing_and_by_a_pixel():
    image, here = torch.randint(0, 256, (8, 10, 3), dtype=torch.uint8), grid_points(8, 10).view(8, 10, 2)
    assert torch.equal(warp_image(image, here), image)
    right = here + torch.tensor([1 / 10, 0], dtype=torch.float64)
    assert torch.equal(warp_image(image, right)[:, :-1], image[:, 1:])


def test_motorcycle_looks_the_same_when_warped():
    pair = open_pairs("motorcycle").pairs[0]
    view = pair.b.view()
    assert view.size == view.camera.size == view.depth.shape[::-1] == (741, 500)
    assert view.camera.K[:2, 2] == pytest.approx([311.193 + 31.086 + 0.5, 254.877 + 0.5])  # published with centres at 0
    for forward in (pair, pair.reversed()):
        a, b = (load_image(frame, 256).float() for frame in (forward.a, forward.b))
        warp = pair_warp(forward, 256, 256)
        visible = warp.visible.view(256, 256)
        warped = warp_image(b.byte(), warp.points.view(256, 256, 2)).float()
        assert visible.double().mean() > 0.6
        assert (warped - a).abs()[visible].mean() < 8 < 20 < (b - a).abs()[visible].mean()

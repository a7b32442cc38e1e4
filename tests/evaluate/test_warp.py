"""True warps are true: against closed forms, against rays cast into rendered scenes, there and back."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plane_world import exact, shot

from fastmum.evaluate.features import load_image
from fastmum.evaluate.pairs import Camera, open_pairs, unit_camera
from fastmum.evaluate.pairs.scenes import from_folders
from fastmum.evaluate.warp import finer, grid_points, move, pair_warp, true_warp
from fastmum.scenes.layout import build_scene
from fastmum.scenes.raycast import View, trace

angle = st.floats(-0.25, 0.25)
place = st.floats(-0.6, 0.6)


def camera_of(view):
    return unit_camera(view.K, view.size, view.depth())


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(place, place, place), st.tuples(angle, angle, angle), st.floats(40, 90), st.integers(1, 9),
    st.integers(1, 9),
)  # fmt: skip
def test_wall_is_warped_by_its_homography(eye, turn, focal, rows, columns):
    a, b = shot((0.1, -0.1, 0.2), (0.05, -0.08, 0.1)), shot(eye, turn, (50, 70), focal)
    points = grid_points(rows, columns)
    warp = true_warp(points, camera_of(a), camera_of(b), torch.from_numpy(b.T @ a.T_world))
    truth = exact(a, b, points.numpy())
    inside = ((truth > 0.02) & (truth < 0.98)).all(1)
    assert (warp.visible.numpy() >= inside).all()
    assert not warp.visible.numpy()[((truth < 0) | (truth >= 1)).any(1)].any()
    # Depth is interpolated as such, which on a slanted wall is right to second order in a pixel.
    error = np.abs(warp.points.numpy() - truth)[warp.visible.numpy()] * 448
    assert error.size == 0 or error.max() < 0.5


def test_identity_for_one_camera_twice():
    camera = camera_of(shot((0.2, 0.1, 0), (0.1, -0.2, 0.3)))
    warp = true_warp(grid_points(7, 5), camera, camera, torch.eye(4, dtype=torch.float64))
    assert warp.visible.all()
    assert torch.allclose(warp.points, grid_points(7, 5), atol=1e-9)


def test_rendered_scenes_against_rays(rendered):
    """Rays cast through A's points and B's landing places must meet the same thing."""
    folder = rendered / "scene_0000"
    cameras = json.loads((folder / "cameras.json").read_text())
    scene, size = build_scene(cameras["seed"], 0), cameras["size"][0]
    pairs = from_folders([folder], gaps=(1, 2), stride=2).pairs
    assert len(pairs) == 5
    errors, missed = [], []
    for pair in pairs:
        ends = (int(name) for name in pair.name.split("/")[1].split("-"))
        views = [
            View(scene.solids, scene.open_top, np.array(frame["K"]), np.array(frame["T_cam_world"]), size, size)
            for frame in (cameras["frames"][i] for i in ends)
        ]
        points = grid_points(16, 16)
        x, y = points.numpy().T * size
        depth, solid = trace(views[0], views[0].directions(x, y), (x, y))
        in_a = np.stack([x, y, np.ones_like(x)]).T @ np.linalg.inv(views[0].K_33).T * depth[:, None]
        in_b = in_a @ pair.T_b_a[:3, :3].T + pair.T_b_a[:3, 3]
        truth = (in_b @ views[1].K_33.T)[:, :2] / in_b[:, 2:]
        inside = (in_b[:, 2] > 0) & (solid >= 0) & ((truth > 0) & (truth < size)).all(1)
        met, _ = trace(views[1], views[1].directions(*truth.T), tuple(truth.T))
        seen = inside & (np.abs(met - in_b[:, 2]) < 0.02 * in_b[:, 2])
        warp = pair_warp(pair, 16, 16)
        errors.append(np.linalg.norm(warp.points.numpy() * size - truth, axis=1)[warp.visible.numpy()])
        missed.append(warp.visible.numpy() != seen)
    errors = np.concatenate(errors)
    assert len(errors) > 500
    assert np.median(errors) < 0.05
    assert np.quantile(errors, 0.95) < 1
    assert np.mean(missed) < 0.06  # at outlines, where depth of neighbouring pixels is of different things


def test_there_and_back_on_rendered_scenes(rendered):
    for pair in open_pairs(str(rendered), "all").pairs:
        there = pair_warp(pair, 24, 24)
        back_pair = pair.reversed()
        points = there.points[there.visible]
        a, b = back_pair.a.read_camera(), back_pair.b.read_camera()
        back = true_warp(points, a, b, torch.from_numpy(back_pair.T_b_a))
        assert back.visible.double().mean() > 0.8
        error = (back.points - grid_points(24, 24)[there.visible]).norm(dim=1)[back.visible] * 96
        assert error.median() < 0.05


def test_what_stands_in_front_hides():
    a, b = shot(), shot((1.0, 0, 0))
    T = torch.from_numpy(b.T @ a.T_world)
    hidden = camera_of(b)
    depth = hidden.depth.copy()
    depth[:, :20] = 1.0  # a board close to B on the left
    points = grid_points(8, 8)
    free = true_warp(points, camera_of(a), hidden, T)
    behind = true_warp(points, camera_of(a), replace_depth(hidden, depth), T)
    left = free.points[:, 0] < 18 / 64
    assert (free.visible & left).any()
    assert not (behind.visible & left).any()
    right = free.points[:, 0] > 22 / 64
    assert torch.equal(behind.visible[right], free.visible[right])


def replace_depth(camera: Camera, depth: np.ndarray) -> Camera:
    return camera._replace(depth=depth)


@pytest.mark.parametrize("side", ["a", "b"])
def test_unknown_depth_is_not_visible(wall_pairs, side):
    pair = wall_pairs.pairs[0]
    frame = getattr(pair, side)
    camera = frame.read_camera()
    blank = replace(frame, read_camera=lambda: replace_depth(camera, np.zeros_like(camera.depth)))
    assert pair_warp(pair, 6, 6).visible.any()
    assert not pair_warp(replace(pair, **{side: blank}), 6, 6).visible.any()


def test_holes_in_depth_do_not_bend_it():
    a, b = shot(), shot((0.3, 0, 0))
    T, camera = torch.from_numpy(b.T @ a.T_world), camera_of(a)
    depth = camera.depth.copy()
    depth[::2, 1::3] = 0
    points = grid_points(11, 13)
    whole = true_warp(points, camera, camera_of(b), T)
    holes = true_warp(points, replace_depth(camera, depth), camera_of(b), T)
    both = whole.visible & holes.visible
    assert both.sum() > 60
    assert torch.allclose(whole.points[both], holes.points[both], atol=1e-6)


def test_behind_the_camera_is_not_visible():
    a = shot()
    b = shot((0, 0, 2 * 4.0), (0, np.pi, 0))  # beyond the wall, looking back at it
    away = shot((0, 0, 2 * 4.0))  # beyond the wall, looking away
    points = grid_points(4, 4)
    depth = camera_of(a).depth
    for other, expected in ((b, True), (away, False)):
        camera = unit_camera(other.K, other.size, np.full_like(depth, 4.0))
        warp = true_warp(points, camera_of(a), camera, torch.from_numpy(other.T @ a.T_world))
        assert warp.visible.any() == expected


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.floats(-0.5, 0.5), st.floats(-0.5, 0.5))
def test_finer_keeps_a_shift(h, w, times, dx, dy):
    points = grid_points(h, w).view(h, w, 2) + torch.tensor([dx, dy], dtype=torch.float64)
    expected = grid_points(h * times, w * times).view(h * times, w * times, 2)
    expected = expected + torch.tensor([dx, dy], dtype=torch.float64)
    assert torch.allclose(finer(points, h * times, w * times), expected, atol=1e-9)


def test_move_by_nothing_and_by_a_pixel():
    image = torch.randint(0, 256, (8, 10, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    here = grid_points(8, 10).view(8, 10, 2)
    assert torch.equal(move(image, here), image)
    right = here + torch.tensor([1 / 10, 0], dtype=torch.float64)
    assert torch.equal(move(image, right)[:, :-1], image[:, 1:])


def test_motorcycle_looks_the_same_when_moved():
    pair = open_pairs("motorcycle").pairs[0]
    a, b = (load_image(frame, 256).float() for frame in (pair.a, pair.b))
    warp = pair_warp(pair, 256, 256)
    visible = warp.visible.view(256, 256)
    moved = move(b.byte(), warp.points.view(256, 256, 2)).float()
    assert visible.double().mean() > 0.6
    assert (moved - a).abs()[visible].mean() < 8 < 20 < (b - a).abs()[visible].mean()
    back = pair_warp(pair.reversed(), 256, 256)
    moved = move(a.byte(), back.points.view(256, 256, 2)).float()
    assert (moved - b).abs()[back.visible.view(256, 256)].mean() < 8

"""Cameras, crops, alignment and metrics against closed forms."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plane_world import shot
from scipy.spatial.transform import Rotation

from fastmum.errors import FastmumError
from fastmum.geometry import Camera, View, crop_resize, metrics, relative_pose
from fastmum.geometry.align import icp, umeyama
from fastmum.geometry.camera import camera_from_pytorch3d, quaternion, ray_to_z, unproject
from fastmum.geometry.crop import clean_depth, flip, reloc3r_view, vggt_view
from fastmum.geometry.warp import grid_points, true_warp

sides = st.integers(5, 20)


def numbered(width: int, height: int) -> View:
    """An image whose red and green are each pixel's column and row + 1, with a camera."""
    y, x = np.mgrid[:height, :width] + 1
    image = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    camera = shot((0.3, -0.2, 0.1), (0.1, -0.2, 0.3), (width, height), 20)
    return View(image, Camera(camera.K, camera.T, (width, height)), (x + 100 * y).astype(np.float32), x % 2 == 0)


def rays(camera: Camera, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Unit directions in the world through pixel coordinates, (..., 3)."""
    found = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(camera.K).T @ camera.camera_from_world[:3, :3]
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


@settings(deadline=None)
@given(sides, sides, st.tuples(*4 * (st.integers(-4, 4),)), st.booleans())
def test_crops_and_flips_keep_the_rays(width, height, edges, flipped):
    """Each pixel's ray in the world is that of the pixel that it was in the original; depth and mask came along."""
    original = numbered(width, height)
    left, top, right, bottom = edges
    view = crop_resize(original, (left, top, max(width + right, left + 1), max(height + bottom, top + 1)))
    view = flip(view) if flipped else view
    rows, columns = np.nonzero(view.image[..., 0])  # 0 is outside of the original
    x, y = (view.image[rows, columns, i].astype(float) - 0.5 for i in (0, 1))
    assert np.allclose(rays(view.camera, columns + 0.5, rows + 0.5), rays(original.camera, x, y))
    assert np.array_equal(view.depth[rows, columns], original.depth[y.astype(int), x.astype(int)])
    assert np.array_equal(view.mask[rows, columns], original.mask[y.astype(int), x.astype(int)])
    assert not view.depth[view.image[..., 0] == 0].any()
    assert view.size == view.camera.size == view.depth.shape[::-1] == view.mask.shape[::-1]
    outside = crop_resize(original, (-9, -9, -5, -6)).image
    assert outside.shape == (3, 4, 3)
    assert not outside.any()


@settings(deadline=None)
@given(sides, sides, st.integers(1, 4), st.integers(1, 4))
def test_resizes_move_the_principal_point_and_the_focal_length(width, height, by_x, by_y):
    original = numbered(width, height)
    view = crop_resize(original, None, (by_x * width, by_y * height), resample=Image.Resampling.NEAREST)
    # The centre of a block of equal pixels is the centre of the pixel.
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    assert np.allclose(rays(view.camera, by_x * x, by_y * y), rays(original.camera, x, y))
    assert np.array_equal(view.depth[by_y // 2 :: by_y, by_x // 2 :: by_x], original.depth)
    back = view.camera.resized(original.size)
    assert np.allclose(back.K, original.camera.K)
    assert back.size == original.size


@pytest.mark.parametrize("recipe", [lambda v: vggt_view(v, (8, 8)), lambda v: reloc3r_view(v, (8, 8), None)])
def test_recipes_need_a_principal_point_inside(recipe):
    view = numbered(20, 20)
    for camera in (None, replace(view.camera, K=view.camera.K + [[0, 0, 15], [0, 0, 0], [0, 0, 0]])):
        with pytest.raises(FastmumError, match="principal point"):
            recipe(replace(view, camera=camera))


def test_intrinsics_of_another_size_are_refused():
    """Reloc3r's rule: the principal point is further than a fifth of a side from each border."""
    view = numbered(80, 60)
    for factor, refused in ((0.5, False), (0.35, True)):
        other = replace(view, camera=replace(view.camera, K=np.diag([factor, factor, 1.0]) @ view.camera.K))
        with pytest.raises(FastmumError, match="another size") if refused else nullcontext():
            reloc3r_view(other, (8, 8), None)


def test_vggt_view_of_a_part():
    view = vggt_view(numbered(40, 30), (16, 16), scale=(0.5, 0.8), margin=6)
    assert view.size == (16, 16)
    # 20 of 40 columns and 24 of 30 rows are kept; 20 columns fill 16 + 6 pixels.
    assert view.camera.K[0, 0] / numbered(40, 30).camera.K[0, 0] == pytest.approx(22 / 20)
    assert np.allclose(view.camera.K[:2, 2], 8, atol=1.5)


def test_depth_and_rays():
    camera = shot((0.3, 0.1, 0.4), (0.1, 0.2, 0.1))
    distance = np.linalg.norm(unproject(camera.depth(), camera.K), axis=-1).astype(np.float32)
    assert np.allclose(ray_to_z(distance, camera.K), camera.depth(), rtol=1e-6)
    assert np.isnan(clean_depth(np.full((2, 2), np.nan))).all()


def test_pytorch3d_cameras():
    viewpoint = {"R": np.eye(3), "T": [1, 2, 3], "focal_length": [2, 1], "principal_point": [0, 0]}
    focals = {"ndc_norm_image_bounds": (100, 30), "ndc_isotropic": (60, 30), "vggt": (99, 29.5)}
    for ndc, focal in focals.items():
        camera = camera_from_pytorch3d(viewpoint | {"intrinsics_format": ndc}, (100, 60))
        assert camera.K[:2, 2].tolist() == [50, 30]
        assert (camera.K[0, 0], camera.K[1, 1]) == focal
        assert camera.camera_from_world[:3, 3].tolist() == [-1, -2, 3]
    with pytest.raises(ValueError, match="inches"):
        camera_from_pytorch3d(viewpoint | {"intrinsics_format": "inches"}, (100, 60))


def test_quaternions_and_rotation_errors():
    true = Rotation.random(500, random_state=0)
    angles = np.array([0, 1e-5, 30, 179.999, 180]).repeat(100)
    axis = Rotation.random(500, random_state=1).as_matrix()[:, 0]
    turned = true * Rotation.from_rotvec(axis * angles[:, None], degrees=True)
    a, b = turned.as_matrix(), true.as_matrix()
    assert np.allclose(np.abs((quaternion(a)[:, [1, 2, 3, 0]] * turned.as_quat()).sum(1)), 1)
    assert np.allclose(metrics.rotation_error(a, b), angles, atol=1e-6)
    assert np.allclose(metrics.rotation_error_quaternion(a, b), angles, atol=1e-4)
    assert metrics.rotation_error(a[0], b[0]).shape == ()


def test_direction_errors_and_aucs():
    t, true = np.eye(3), np.array([[2.0, 0, 0], [0, -1, 0], [0, 0, 0]])
    assert np.array_equal(metrics.direction_error(t, true), [0, 180, np.nan], equal_nan=True)
    assert metrics.direction_error(t, true, folded=True)[1] == 0
    nan = np.array([1.0, np.nan])
    assert metrics.pose_auc(nan, [2]) == metrics.pose_auc(np.array([1.0, 180]), [2]) == pytest.approx([0.375])
    assert metrics.pose_auc_histogram(nan, [1, 2]) == [0.5, 0.25]


def test_alignment_never_mirrors_and_needs_pairs():
    source = np.random.default_rng(0).uniform(-1, 1, (200, 3))
    similarity = umeyama(source, 3 * source + 1)
    assert similarity.scale == pytest.approx(3)
    assert np.allclose(similarity(source), 3 * source + 1)
    assert np.linalg.det(umeyama(source, source * [-1, 1, 1]).R) == pytest.approx(1)
    far = icp(source, source + 100, 1.0)
    assert np.array_equal(far.transformation, np.eye(4))
    assert (far.fitness, far.rmse) == (0, 0)
    R, t = Rotation.from_rotvec([0.01, 0, 0.02]).as_matrix(), np.array([0.01, -0.02, 0])
    near = icp(source, source @ R.T + t, 1.0)
    assert np.allclose(near.transformation[:3], np.c_[R, t], atol=1e-6)


def test_metrics_of_half_a_plane():
    x, y = np.meshgrid(np.arange(10.0), np.arange(10.0))
    true = np.stack([x, y, 0 * x], -1).reshape(-1, 3)
    half = true[true[:, 0] < 5] + [0, 0, 0.5]
    tilted = np.tile([0, 0.6, 0.8], (50, 1))
    found = metrics.point_metrics(half, true, tilted, np.tile([0, 0, -1.0], (100, 1)))
    to_half = np.hypot(0.5, np.maximum(true[:, 0] - 4, 0))
    expected = {"acc": [0.5], "comp": to_half, "nc1": [0.8], "nc2": [0.8]}
    for name, values in expected.items():
        assert found[f"{name}_mean"] == pytest.approx(np.mean(values)), name
        assert found[f"{name}_median"] == pytest.approx(np.median(values)), name


def test_depth_metrics_of_few_pixels():
    true = np.array([[5.0, 11.0]])  # the second is above the maximum
    found = metrics.depth_metrics(np.full((1, 2), 99.0), true, 10)  # clipped to 10
    assert (found["rmse"], found["abs_rel"], found["a3"]) == (5, 1, 0)
    empty = metrics.depth_metrics(true, 0 * true, 10)
    assert all(np.isnan(value) for value in empty.values())
    assert metrics.mean_metrics([found, empty]) == found
    assert np.isnan(metrics.mean_metrics([empty])["rmse"])
    diverged = metrics.depth_metrics(np.full((1, 2), np.nan), true, 10)  # not dropped like an image without truth
    assert metrics.mean_metrics([found, diverged, empty])["rmse"] == np.inf


def test_warps_of_a_batch():
    shots = [shot((0.1 * i, 0, 0), (0, 0.02 * i, 0), focal=60 + i) for i in range(3)]
    K, depth = (torch.from_numpy(np.stack(each)) for each in zip(*((s.K, s.depth()) for s in shots), strict=True))
    T = torch.from_numpy(np.stack([relative_pose(shots[0].T, s.T) for s in shots]))
    points = grid_points(5, 6).expand(3, -1, -1)
    views = [x[:1].expand_as(x) for x in (depth, K)]
    views = [views[0], depth, views[1], K, T]
    batch = true_warp(points, *views)
    for i in range(3):
        one = true_warp(points[i], *(x[i] for x in views))
        assert torch.equal(one.visible, batch.visible[i])
        assert torch.allclose(one.points, batch.points[i])
    assert batch.visible.any(-1).all()
    low = true_warp(points.float(), *views)
    assert low.points.dtype == torch.float32
    assert torch.allclose(low.points.double()[batch.visible], batch.points[batch.visible], atol=1e-5)

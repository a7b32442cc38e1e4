"""Numbers of public code (VGGT, Reloc3r, RoMa, Pi3, open3d, CAPI, the depth toolbox): its own outputs, as files."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from public_files import files
from safetensors import safe_open
from safetensors.numpy import load_file
from scipy.spatial import cKDTree

from fastmum.geometry import align, metrics
from fastmum.geometry.camera import Camera, camera_from_pytorch3d, rigid_inverse, transform, unproject
from fastmum.geometry.crop import View, clean_depth, reloc3r_view, vggt_view


def described(file: Path) -> dict[str, Any]:
    return json.loads(file.with_suffix(".json").read_text())


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return load_file(file.with_suffix(".safetensors"))


def shift(K: np.ndarray, by: float) -> np.ndarray:
    """K with another pixel centre: VGGT and Reloc3r have it at integers."""
    K = K.astype(np.float64)
    K[:2, 2] += by
    return K


def view_of(tensors: dict[str, np.ndarray], case: str) -> View:
    image, K, pose = (tensors[f"vggt/{case}/in/{name}"] for name in ("image", "K", "extrinsics"))
    camera = Camera(shift(K, 0.5), np.vstack([pose, [0, 0, 0, 1]]), image.shape[1::-1])
    return View(image, camera, tensors[f"vggt/{case}/in/depth"])


@pytest.mark.parametrize("file", files("geometry", "geometry.json"))
def test_public_crops(file):
    tensors, cases = tensors_of(file), described(file)
    kinds = set()
    for name, case in cases.items():
        kind, _, image = name.partition("/")
        out = {key.removeprefix(f"{name}/out/"): x for key, x in tensors.items() if key.startswith(f"{name}/out/")}
        if kind == "vggt":
            height, width = case["target_shape"]
            view = vggt_view(view_of(tensors, image), (width, height))
            assert np.array_equal(view.depth, out["depth"]), name
            assert np.array_equal(view.depth > 1e-8, out["mask"]), name
            assert np.allclose(view.camera.camera_from_world[:3], out["extrinsics"], atol=1e-12), name
            points = unproject(view.depth, view.camera.K)
            world = transform(rigid_inverse(view.camera.camera_from_world), points)
            assert np.allclose(points, out["cam_points"], rtol=1e-5, atol=1e-5), name
            assert np.allclose(world, out["world_points"], rtol=1e-5, atol=1e-5), name
        elif kind == "reloc3r":
            view = reloc3r_view(view_of(tensors, image), tuple(case["resolution_wh"]), np.random.default_rng(0))
        else:
            continue
        kinds.add(kind)
        assert view.image.shape == out["image"].shape, name
        assert np.abs(view.image - out["image"].astype(int)).max() <= 1, name  # Pillow's versions differ
        assert np.allclose(shift(view.camera.K, -0.5), out["K"], rtol=1e-5, atol=1e-5), name
    assert kinds


@pytest.mark.parametrize("file", files("geometry", "geometry.json"))
def test_public_co3d_cameras_and_depth_thresholds(file):
    cases = [case for name, case in described(file).items() if name.startswith("co3d")]
    for case in cases:
        height, width = case["annotation"]["image"]["size"]
        camera = camera_from_pytorch3d(case["annotation"]["viewpoint"], (width, height), "vggt")
        assert np.allclose(camera.camera_from_world[:3], case["extrinsics"], atol=1e-9)
        assert np.allclose(shift(camera.K, -0.5), case["K"], rtol=1e-5, atol=1e-5)
    tensors = tensors_of(file)
    depth = tensors.get("threshold/in")
    assert cases or depth is not None
    if depth is not None:
        assert np.array_equal(clean_depth(depth, 98), tensors["threshold/p98"], equal_nan=True)
        assert np.array_equal(clean_depth(np.nan_to_num(depth), None, 5.0), tensors["threshold/max5_of_nan_to_0"])


@pytest.mark.parametrize("file", files("metrics", "pose_auc.json"))
def test_public_pose_auc(file):
    for case in described(file).values():
        errors = np.maximum(case["rot"], case["trans"])
        for key in ("reloc3r_trapezoid", "roma_trapezoid"):
            areas = {float(name.removeprefix("auc@")): area for name, area in case[key].items()}
            assert metrics.pose_auc(errors, list(areas)) == pytest.approx(list(areas.values()), abs=1e-12)
        areas = {int(name): area for name, area in case["vggt_histogram"].items()}
        areas[30] = case.get("reloc3r_histogram_30", areas.get(30))
        assert metrics.pose_auc_histogram(errors, list(areas)) == pytest.approx(list(areas.values()), abs=1e-12)


@pytest.mark.parametrize("file", files("metrics", "pose_errors.safetensors"))
def test_public_pose_errors(file):
    tensors = tensors_of(file)
    true, found = tensors["gt_w2c"], tensors["pred_w2c"]
    pairs = [metrics.pair_poses(poses) for poses in (found, true)]
    # Consecutive frames, the matrices read as camera to world; the file's note says where a translation is negated.
    steps = [np.linalg.inv(poses[:-1]) @ poses[1:] for poses in (found, true)]
    note = (safe_open(file, "np").metadata() or {}).get("note", "")
    for pair in re.findall(r"in pair (\d+) the predicted translation is negated", note):
        steps[0][int(pair), :3, 3] *= -1
    for (a, b), error, folded, key, tolerance in (
        (pairs, metrics.rotation_error_quaternion, None, "vggt/rotation_deg", 1e-8),
        (pairs, metrics.direction_error, True, "vggt/translation_deg", 1e-8),
        (steps, metrics.rotation_error, None, "reloc3r/rotation_deg", 1e-8),
        (steps, metrics.direction_error, False, "reloc3r/translation_deg", 1e-8),
        (steps, metrics.direction_error, True, "roma/translation_deg_folded", 1e-5),  # stored in float32
    ):
        values = error(a[:, :3, :3], b[:, :3, :3]) if folded is None else error(a[:, :3, 3], b[:, :3, 3], folded)
        assert np.allclose(values, tensors[key], rtol=1e-6, atol=tolerance), key


@pytest.mark.parametrize("file", files("metrics", "points.json"))
def test_public_points(file):
    tensors = tensors_of(file)
    for name, case in described(file).items():
        mask = tensors[f"{name}/mask"]
        points, true = (tensors[f"{name}/{kind}"][mask].astype(np.float64) for kind in ("pred", "gt"))
        scale, R, t = align.umeyama(points, true)
        assert scale == pytest.approx(case["umeyama_scale"], rel=1e-6)
        assert np.allclose(R, case["umeyama_R"], atol=1e-6)
        assert np.allclose(t, case["umeyama_t"], rtol=1e-6, atol=1e-6)
        points = scale * points @ R.T + t
        assert metrics.point_metrics(points, true) == pytest.approx(case["before_icp"], rel=1e-6)
        found = align.icp(points, true, case["icp_threshold"])
        assert np.allclose(found.transformation, case["icp_transformation"], rtol=1e-6, atol=1e-6)
        assert (found.fitness, found.rmse) == pytest.approx((case["icp_fitness"], case["icp_inlier_rmse"]), rel=1e-6)
        points = transform(found.transformation, points)
        normals = [metrics.estimate_normals(each) for each in (points, true)]
        # Which of two points at the same distance is the 30th neighbour is undefined; ties change a few normals.
        distances = [cKDTree(each).query(each, k=[30, 31])[0] for each in (points, true)]
        ties = sum(np.isclose(*each.T, rtol=1e-9, atol=0).sum() for each in distances)
        tolerances = {"nc": 1e-6 + 0.1 * ties / len(true)}
        values = metrics.point_metrics(points, true, *normals)
        for key, expected in case["after_icp"].items():
            assert values[key] == pytest.approx(expected, rel=1e-6, abs=tolerances.get(key[:2], 0)), key


@pytest.mark.parametrize("file", files("metrics", "depth.json"))
def test_public_depth(file):
    tensors, sets = tensors_of(file), {name: case for name, case in described(file).items() if isinstance(case, dict)}
    assert sets
    for name, case in sets.items():
        height, width = case["size"]
        found = []
        for i, expected in enumerate(case["per_image"]):
            depth, true = (
                tensors[f"{name}/{kind}_{i}_by15"].repeat(15, 0).repeat(15, 1)[:height, :width]
                for kind in ("pred", "gt")
            )
            found.append(metrics.depth_metrics(depth, true, case["max_depth"], case["min_depth"], case["crop"]))
            assert found[-1] == pytest.approx(expected, rel=2e-5, nan_ok=True)  # computed in float32
        assert metrics.mean_metrics(found) == pytest.approx(case["mean"], rel=2e-5, nan_ok=True)

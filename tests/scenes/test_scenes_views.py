"""Poses, intrinsics and depth agree with each other and with the images, which are lit, varied and predictable."""

import itertools
import json

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from fastmum.evaluate.pairs import pair_warp
from fastmum.evaluate.pairs.scenes import from_folders
from fastmum.geometry.warp import grid_points
from fastmum.scenes import ensure_scenes, scene_dirs
from fastmum.scenes.layout import build_scene
from fastmum.scenes.raycast import SceneView, trace
from fastmum.scenes.shapes import CYLINDER, SHELL, SIDES, SPHERE, fold, unfold
from fastmum.scenes.textures import MATERIALS, Face

SIZE = 96  # pixels


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Four scenes of 4 views, their cameras.json, and pairs of neighbouring views; scene 3 is a courtyard."""
    root = ensure_scenes(4, 4, SIZE, 0, cache_dir=tmp_path_factory.mktemp("cache"), workers=2, progress=False)
    cameras = [json.loads((folder / "cameras.json").read_text()) for folder in scene_dirs(root, 4)]
    pairs = [from_folders([folder], gaps=(1,)).pairs for folder in scene_dirs(root, 4)]
    return list(zip((build_scene(0, i) for i in range(4)), cameras, pairs, strict=True))


def view_of(scene, frame):
    return SceneView(scene.solids, scene.open_top, frame.K, frame.camera_from_world, SIZE, SIZE)


def test_warps_against_rays(scenes):
    """Rays cast through A's points and their points in B must meet the same surface."""
    errors, missed = [], []
    x, y = grid_points(16, 16).numpy().T * SIZE
    for scene, pair in ((scene, pair) for scene, _, pairs in scenes for pair in pairs):
        a, b = (view_of(scene, frame) for frame in (pair.a, pair.b))
        depth, solid = trace(a, a.directions(x, y), (x, y))
        in_b = (np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(a.K_33).T * depth[:, None]) @ pair.T_b_a[:3, :3].T
        in_b += pair.T_b_a[:3, 3]
        truth = (in_b @ b.K_33.T)[:, :2] / in_b[:, 2:]
        inside = (in_b[:, 2] > 0) & (solid >= 0) & ((truth > 0) & (truth < SIZE)).all(1)
        met, _ = trace(b, b.directions(*truth.T), tuple(truth.T))
        seen = inside & (np.abs(met - in_b[:, 2]) < 0.02 * in_b[:, 2])
        warp = pair_warp(pair, 16, 16)
        errors.extend(np.linalg.norm(warp.points.numpy() * SIZE - truth, axis=1)[warp.visible.numpy()])
        missed.append(warp.visible.numpy() != seen)
    assert len(errors) > 2000
    assert np.median(errors) < 0.01
    assert np.quantile(errors, 0.95) < 0.2
    assert np.mean(missed) < 0.05  # at outlines, where neighbouring pixels show different surfaces


def test_images_agree_with_poses_and_depth(scenes):
    """b sampled where a's pixels land is a; a shift by half a pixel is worse."""
    for _, _, (pair, *_) in scenes:
        warp = pair_warp(pair, SIZE, SIZE)
        place, seen = warp.points.numpy().T[::-1] * SIZE, warp.visible.numpy()
        seen &= ((place > 2) & (place < SIZE - 2)).all(0)
        assert seen.mean() > 0.5
        grey_a, grey_b = (np.asarray(frame.read_image(), float).mean(-1) for frame in (pair.a, pair.b))
        difference = [
            np.abs(map_coordinates(grey_b, place[:, seen] - 0.5 + shift, order=1) - grey_a.ravel()[seen]).mean()
            for shift in np.array([(0, 0), (0, 0.5), (0, -0.5), (0.5, 0), (-0.5, 0)])[..., None]
        ]
        assert difference[0] < 0.93 * min(difference[1:])


def level(solids, points, which):
    """Below 1 inside a solid, 1 on its surface."""
    q = np.einsum("nij,nj->ni", solids.to_unit_S33[which].astype(np.float64), points - solids.centre_S3[which])
    kind, cube, tube = solids.kind_S[which], np.abs(q).max(-1), np.maximum(np.hypot(q[:, 0], q[:, 1]), np.abs(q[:, 2]))
    return np.where(kind == SPHERE, np.sqrt((q * q).sum(-1)), np.where(kind == CYLINDER, tube, cube))


def test_first_hits_lie_on_a_surface_with_nothing_before_them():
    """Checks points along the rays, independently of the formulas for intersections."""
    rng = np.random.default_rng(5)
    for index in (0, 3):
        scene = build_scene(0, index)
        T = scene.path.poses(5)[4]
        eye = np.linalg.inv(T)[:3, 3]
        view = SceneView(scene.solids, scene.open_top, scene.path.intrinsics(64), T, 64, 64)
        x, y = rng.uniform(0, 64, (2, 300))
        depth, solid = trace(view, view.directions(x, y), (x, y))
        hit = solid >= 0
        d = view.directions(x, y).T.astype(np.float64)
        points = eye + d * depth[:, None]
        assert np.abs(level(scene.solids, points[hit], solid[hit]) - 1).max() < 1e-3
        for share in np.linspace(0.02, 0.995, 60):
            before = eye + d[hit] * (share * depth[hit, None])
            for s in range(len(scene.solids)):
                inside = level(scene.solids, before, np.full(len(before), s)) < 0.999
                if scene.solids.kind_S[s] == SHELL:
                    assert inside.all() or scene.open_top
                else:
                    assert not inside.any(), (index, s, share)


def test_unfold_is_the_inverse_of_fold():
    rng = np.random.default_rng(2)
    for kind, side in ((k, side) for k in SIDES for side in SIDES[k]):
        u, v = rng.uniform(0.25, 0.75, (2, 50))  # inside the disc of a lid or half a sphere
        q, _ = fold(kind, side, u, v)
        found, u2, v2 = unfold(np.full(50, kind), np.ascontiguousarray(q.T))
        assert (found == side).all()
        np.testing.assert_allclose(u2, u, atol=2e-6)
        np.testing.assert_allclose(v2, v, atol=2e-6)


def test_views_are_valid_lit_and_varied(scenes):
    open_air, means, (y, x) = 0, [], np.mgrid[:SIZE, :SIZE] + 0.5
    for scene, cameras, pairs in scenes:
        assert cameras["pixel_centre"] == 0.5
        assert cameras["depth_unit"] <= 0.0005
        for frame in (pairs[0].a, *(pair.b for pair in pairs)):
            R, focal, depth = frame.camera_from_world[:3, :3], frame.K[0, 0], frame.read_depth()
            np.testing.assert_allclose(np.cross(R[0], R[1]), R[2], atol=1e-12)
            np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
            assert R[1, 2] < -0.8  # y points down
            assert 55 <= 2 * np.degrees(np.arctan(SIZE / 2 / focal)) <= 75
            np.testing.assert_array_equal(frame.K, [[focal, 0, SIZE / 2], [0, focal, SIZE / 2], [0, 0, 1]])
            known = depth > 0
            open_air += not known.all()
            assert known.all() or cameras["kind"] == "courtyard"
            assert known.mean() > 0.5
            assert 0.25 < depth[known].min() <= depth.max() < 65535 * cameras["depth_unit"]
            view = view_of(scene, frame)
            exact, _ = trace(view, view.directions(x[known], y[known]), (x[known], y[known]))
            assert np.quantile(np.abs(depth[known] - exact), 0.995) <= 0.5 * cameras["depth_unit"] + 2e-6
            image = np.asarray(frame.read_image(), float)
            grey = image.mean(-1)
            assert 55 < grey.mean() < 200
            assert grey.std() > 18
            assert ((image <= 4) | (image >= 253)).any(-1).mean() < 0.02
            assert (grey.reshape(12, 8, 12, 8).std(axis=(1, 3)) < 0.5).mean() < 0.05, "large flat areas"
        means.append(image.mean((0, 1)))
    assert open_air, "no scene shows the sky"
    assert min(np.abs(a - b).sum() for a, b in itertools.combinations(means, 2)) > 2


def test_paths_of_many_scenes_keep_clear_and_move_steadily():
    for index in range(20):
        scene = build_scene(0, index)
        T = scene.path.poses(24)
        eyes = np.stack([-t[:3, :3].T @ t[:3, 3] for t in T])
        assert scene.solids.distance_SN(eyes.astype(np.float32)).min() > 0.3
        steps = np.linalg.norm(np.diff(eyes, axis=0), axis=1)
        assert 0.05 < steps.min() <= steps.max() < 0.3
        cosine = (np.einsum("nij,nij->n", T[1:, :3, :3], T[:-1, :3, :3]) - 1) / 2
        turns = np.degrees(np.arccos(cosine))
        assert 1.5 < turns.min() <= turns.max() < 10


def test_every_material_is_in_range_and_never_repeats():
    more = {"tiles": {"size": (0.3, 0.1), "bond": 0.5}, "ground": {"name": "grass.png"}}
    colours = (0.6, 0.5, 0.4), (0.4, 0.5, 0.6)
    for name, material in MATERIALS.items():
        for shape in ((256, 320), (3, 40), (40, 3), (1, 1)):
            out = material(np.random.default_rng(1), Face(*shape, 0.01), *colours, **more.get(name, {}))
            assert (out.shape, out.dtype) == ((3, *shape), np.float32), name
            assert -0.3 < out.min() <= out.max() < 2, name
        if name != "glow":
            big = material(np.random.default_rng(2), Face(512, 512, 0.004), *colours, **more.get(name, {})).mean(0)
            assert abs(np.corrcoef(big[:256, :256].ravel(), big[256:, 256:].ravel())[0, 1]) < 0.9, f"{name} repeats"

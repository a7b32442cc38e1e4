"""Poses, intrinsics and depth agree with each other and with the images, which are lit, varied and predictable."""

from __future__ import annotations

import itertools
import json
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import map_coordinates

from fastmum.scenes import ensure_scenes, scene_dirs
from fastmum.scenes.layout import build_scene
from fastmum.scenes.raycast import SceneView, trace
from fastmum.scenes.shapes import CYLINDER, SHELL, SIDES, SPHERE, fold, unfold
from fastmum.scenes.textures import MATERIALS, Face


class Frame(NamedTuple):
    """A stored view: image [H, W, 3] float64, depth [H, W] in metres (0: unknown), K [3, 3], T [4, 4]."""

    image: np.ndarray
    depth: np.ndarray
    K: np.ndarray
    T: np.ndarray

    def view(self, scene):
        return SceneView(scene.solids, scene.open_top, self.K, self.T, *self.depth.shape)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> list[tuple[dict, list[Frame]]]:
    """Four scenes of 4 views at 96 pixels, seed 0; scene 3 is a courtyard."""
    root = ensure_scenes(4, 4, 96, 0, cache_dir=tmp_path_factory.mktemp("cache"), workers=2, progress=False)
    scenes = []
    for folder in scene_dirs(root, 4):
        cameras, frames = json.loads((folder / "cameras.json").read_text()), []
        for entry in cameras["frames"]:
            image, depth = (np.asarray(Image.open(folder / entry[key])).astype(np.float64) for key in ("file", "depth"))
            K, T = np.array(entry["K"]), np.array(entry["T_cam_world"])
            frames.append(Frame(image, depth * cameras["depth_unit"], K, T))
        scenes.append((cameras, frames))
    return scenes


def centres(shape):
    """Pixel centres (x_N, y_N), the first at (0.5, 0.5)."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return x.ravel() + 0.5, y.ravel() + 0.5


def lift(x, y, depth, K, T):
    """World points [N, 3] of pixels at a z-depth."""
    camera = np.stack([(x - K[0, 2]) / K[0, 0] * depth, (y - K[1, 2]) / K[1, 1] * depth, depth], -1)
    return (camera - T[:3, 3]) @ T[:3, :3]


def project(points, K, T):
    """Pixel coordinates and z-depth of world points."""
    camera = points @ T[:3, :3].T + T[:3, 3]
    return (*(camera[:, :2] / camera[:, 2:] @ K[:2, :2].T + K[:2, 2]).T, camera[:, 2])


def test_stored_depth_warps_to_the_exact_place(scenes):
    """Warp a to b by the stored and by the exact depth; cast a ray of b there; if it hits the same point, go back."""
    for index, (cameras, frames) in enumerate(scenes):
        scene = build_scene(cameras["seed"], index)
        for a, b in itertools.pairwise(frames):
            x, y = (c[a.depth.ravel() > 0] for c in centres(a.depth.shape))
            stored = a.depth[a.depth > 0]
            exact, _ = trace(a.view(scene), a.view(scene).directions(x, y), (x, y))
            assert np.quantile(np.abs(stored - exact), 0.995) <= 0.5 * cameras["depth_unit"] + 2e-6
            u, v, far = project(lift(x, y, stored, a.K, a.T), b.K, b.T)
            u_true, v_true, _ = project(lift(x, y, exact, a.K, a.T), b.K, b.T)
            inside = (far > 0) & (u > 0) & (u < b.depth.shape[1]) & (v > 0) & (v < b.depth.shape[0])
            assert inside.mean() > 0.5
            error = np.hypot(u - u_true, v - v_true)[inside]
            assert np.median(error) < 0.01
            assert error.max() < 0.1
            at = u[inside], v[inside]
            hit, _ = trace(b.view(scene), b.view(scene).directions(*at), at)
            same = np.abs(hit - far[inside]) < 0.01 * far[inside]  # nothing in between
            assert same.mean() > 0.6
            u_back, v_back, _ = project(lift(*at, hit, b.K, b.T), a.K, a.T)
            assert np.median(np.hypot(u_back - x[inside], v_back - y[inside])[same]) < 0.05


def test_images_agree_with_poses_and_depth(scenes):
    """b sampled where a's pixels land is a; a shift by half a pixel is worse."""
    for _, (a, b, *_) in scenes:
        x, y = centres(a.depth.shape)
        u, v, far = project(lift(x, y, a.depth.ravel(), a.K, a.T), b.K, b.T)
        rows, columns = np.floor(v).astype(int), np.floor(u).astype(int)
        seen = (a.depth.ravel() > 0) & (rows >= 2) & (rows < 94) & (columns >= 2) & (columns < 94)
        seen[seen] = np.abs(b.depth[rows[seen], columns[seen]] - far[seen]) < 0.02 * far[seen]
        place, grey_a, grey_b = np.stack([v[seen], u[seen]]), a.image.mean(-1).ravel()[seen], b.image.mean(-1)
        difference = [
            np.abs(map_coordinates(grey_b, place - 0.5 + np.array([[dv], [du]]), order=1) - grey_a).mean()
            for du, dv in ((0, 0), (0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5))
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
        view = SceneView(scene.solids, scene.open_top, scene.path.intrinsics(64), T, 64, 64)
        x, y = rng.uniform(0, 64, (2, 300))
        depth, solid = trace(view, view.directions(x, y), (x, y))
        hit = solid >= 0
        d = view.directions(x, y).T.astype(np.float64)
        points = view.eye_3 + d * depth[:, None]
        assert np.abs(level(scene.solids, points[hit], solid[hit]) - 1).max() < 1e-3
        for share in np.linspace(0.02, 0.995, 60):
            before = view.eye_3 + d[hit] * (share * depth[hit, None])
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


def test_poses_intrinsics_and_depth_are_valid(scenes):
    open_air = 0
    for cameras, frames in scenes:
        assert cameras["pixel_centre"] == 0.5
        assert cameras["depth_unit"] <= 0.0005
        for frame in frames:
            R, focal, size = frame.T[:3, :3], frame.K[0, 0], frame.image.shape[0]
            np.testing.assert_allclose(np.cross(R[0], R[1]), R[2], atol=1e-12)
            np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
            assert R[1, 2] < -0.8  # y points down
            assert 55 <= 2 * np.degrees(np.arctan(size / 2 / focal)) <= 75
            np.testing.assert_array_equal(frame.K, [[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
            known = frame.depth > 0
            open_air += not known.all()
            assert known.all() or cameras["kind"] == "courtyard"
            assert known.mean() > 0.5
            assert frame.depth[known].min() > 0.25
            assert frame.depth.max() < 65535 * cameras["depth_unit"]
    assert open_air, "no scene shows the sky"


def test_paths_of_many_scenes_keep_clear_and_move_steadily():
    for index in range(20):
        scene = build_scene(0, index)
        T = scene.path.poses(24)
        eyes = np.stack([-t[:3, :3].T @ t[:3, 3] for t in T])
        assert scene.solids.distance_SN(eyes.astype(np.float32)).min() > 0.3
        steps = np.linalg.norm(np.diff(eyes, axis=0), axis=1)
        assert steps.min() > 0.05
        assert steps.max() < 0.3
        cosine = (np.einsum("nij,nij->n", T[1:, :3, :3], T[:-1, :3, :3]) - 1) / 2
        turns = np.degrees(np.arccos(cosine))
        assert turns.min() > 1.5
        assert turns.max() < 10


def test_brightness_contrast_and_smoothness(scenes):
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(96), np.fft.fftfreq(96)))
    for frame in (frame for _, frames in scenes for frame in frames):
        image, grey = frame.image, frame.image.mean(-1)
        assert 55 < image.mean() < 200
        assert grey.std() > 18
        assert ((image <= 4) | (image >= 253)).any(-1).mean() < 0.02
        blocks = grey.reshape(12, 8, 12, 8).std(axis=(1, 3))
        assert (blocks < 0.5).mean() < 0.05, "large flat areas"
        assert 0.75 < np.corrcoef(grey[:, 1:].ravel(), grey[:, :-1].ravel())[0, 1] < 0.999
        power = np.abs(np.fft.fft2((grey - grey.mean()) * np.outer(np.hanning(96), np.hanning(96)))) ** 2
        bands = [power[(f > low) & (f <= 2 * low)].mean() for low in (0.03, 0.06, 0.12, 0.24)]
        slope = np.polyfit(np.log([1, 2, 4, 8]), np.log(bands), 1)[0]
        assert -4.5 < slope < -1.0, "natural images fall off as about frequency squared"
    means = np.array([np.mean([frame.image.mean((0, 1)) for frame in frames], 0) for _, frames in scenes])
    apart = np.abs(means[:, None] - means[None]).sum(-1)
    assert apart[np.triu_indices(len(means), 1)].min() > 2


def test_every_material_is_in_range_and_never_repeats():
    more = {"tiles": {"size": (0.3, 0.1), "bond": 0.5}, "ground": {"name": "grass.png"}}
    colours = (0.6, 0.5, 0.4), (0.4, 0.5, 0.6)
    for name, material in MATERIALS.items():
        for shape in ((256, 320), (3, 40), (40, 3), (1, 1)):
            out = material(np.random.default_rng(1), Face(*shape, 0.01), *colours, **more.get(name, {}))
            assert (out.shape, out.dtype) == ((3, *shape), np.float32), name
            assert np.isfinite(out).all(), name
            assert out.min() > -0.3, name
            assert out.max() < 2, name
        if name != "glow":
            big = material(np.random.default_rng(2), Face(512, 512, 0.004), *colours, **more.get(name, {})).mean(0)
            assert abs(np.corrcoef(big[:256, :256].ravel(), big[256:, 256:].ravel())[0, 1]) < 0.9, f"{name} repeats"

"""MegaDepth's scene information: frames, cameras, pairs with their overlap, what training leaves out, and damage."""

import numpy as np
import pytest
from plane_world import walk

from fastmum.data.build import build
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests
from fastmum.data.overlap import pair_table
from fastmum.data.pair_loader import PairLoader, square_view
from fastmum.data.samples import manifest_frame
from fastmum.data.scene_info import scene_file
from fastmum.tasks.roma.data import RomaPlanner

SHOTS = walk(4)


def write_scene(root, scene, without_depth=()):
    """Image 1 of 5 is absent, as in the published files."""
    images, depths, cameras, poses = ([None] * 5 for _ in range(4))
    for i, shot in zip((0, 2, 3, 4), SHOTS, strict=True):
        images[i] = f"Undistorted_SfM/{scene}/images/{i}.jpg"
        depths[i] = None if i in without_depth else f"phoenix/{scene}/depths/{i}.h5"
        shot.save(root / images[i], root / f"phoenix/{scene}/depths/{i}.h5", shot.depth())
        cameras[i], poses[i] = shot.K, shot.T
    pairs = np.array([[0, 2], [0, 3], [3, 4], [2, 4]])
    content = {
        "image_paths": np.array(images, object), "depth_paths": np.array(depths, object),
        "intrinsics": np.array([*cameras, None], object)[:5], "poses": np.array([*poses, None], object)[:5],
        "pairs": pairs, "overlaps": np.array([0.5, 0.005, 0.02, 0.9]),
    }  # fmt: skip
    file = scene_file(root, scene)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, content, allow_pickle=True)


@pytest.fixture
def manifests(tmp_path) -> Manifests:
    write_scene(tmp_path, "0000")
    write_scene(tmp_path, "0001", without_depth=(2,))
    write_scene(tmp_path, "0015")  # of the test set
    build("megadepth_pairs", tmp_path, tmp_path / "pairs.arrow")
    return Manifests([tmp_path / "pairs.arrow"])


def test_frames_and_listed_pairs(manifests):
    assert [manifests.sequence_name(i) for i in range(manifests.num_sequences)] == ["0000", "0001"]
    assert np.diff(manifests.starts).tolist() == [4, 3]
    table = pair_table(manifests)
    assert table.rows.tolist() == [[0, 1], [0, 2], [2, 3], [1, 3], [4, 5], [5, 6]]
    assert table.overlap == pytest.approx([0.5, 0.005, 0.02, 0.9, 0.005, 0.02])
    frame = manifest_frame(manifests, 6)
    assert frame.file.name == "4.jpg"
    assert pytest.approx(SHOTS[3].K) == frame.K
    assert frame.camera_from_world == pytest.approx(SHOTS[3].T, abs=1e-6)
    assert frame.read_depth() == pytest.approx(SHOTS[3].depth())


def test_matching_trains_on_them(manifests):
    planner = RomaPlanner(
        manifests, {}, 4, (32, 32), 0, 1, sampling="overlap", depth=True, overlap=(0.01, 1.0), second_overlap=0.35,
        shift=3, flip=True,
    )  # fmt: skip
    plan = planner.plan(0)
    pairs = {tuple(sorted(pair)) for pair in plan.rows.reshape(-1, 2).tolist()}
    assert pairs <= {(0, 1), (2, 3), (1, 3), (5, 6)}
    (batch,) = PairLoader((planner, None), 1, square_view).batches([plan], lambda: False)
    assert batch.images.shape == (8, 32, 32, 3)
    assert batch.valid.float().mean() > 0.7


def test_files_that_changed_or_lack_a_key_are_named(manifests, tmp_path):
    write_scene(tmp_path, "0001")
    with pytest.raises(DataError, match=r"0001\.npy.*build it again"):
        pair_table(manifests)
    np.save(scene_file(tmp_path, "0001"), {"pairs": np.zeros((0, 2))}, allow_pickle=True)
    with pytest.raises(DataError, match="image_paths"):
        pair_table(manifests)

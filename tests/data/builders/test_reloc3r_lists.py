"""Reloc3r's lists of pairs: images, cameras and pairs of the four layouts, what is left out, and damage."""

import pickle

import numpy as np
import pytest
from plane_world import walk
from pose_runs import train_tiny

from fastmum.data.build import build
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests
from fastmum.data.pair_lists import LAYOUTS, rows_of_list
from fastmum.data.pair_loader import PairLoader
from fastmum.data.pair_plan import DistantPairs, PairPlanner
from fastmum.data.samples import manifest_frame
from fastmum.geometry import relative_pose
from fastmum.tasks.roma.data import RomaPlanner

SHOTS = walk(4)
NUMBERS = (9, 10, 2, 11)  # of the images of the shots
LISTED = [("A", 0, 2), ("A", 3, 0), ("A", 1, 2), ("B", 0, 1)]  # scene, and shots; image 1 of A does not exist
FOUND = {("A", 9, 2), ("A", 11, 9), ("B", 9, 10)}


def objects(values):
    found = np.empty((len(values), 2), object)
    for i, pair in enumerate(values):
        found[i] = [*pair] if isinstance(pair[0], str) else None
        for side in (0, 1):
            found[i, side] = pair[side]
    return found


def megadepth_dust3r(root):
    """Subscenes have images of the same names; 0022 is of the test set and has no files."""
    scenes, names = {"A": "0001 0", "B": "0001 1", "test": "0022 0"}, [f"{number}_o.jpg" for number in NUMBERS]
    kind = [("scene_id", "i4"), ("im1_id", "i4"), ("im2_id", "i4"), ("score", "f4")]
    listed = [(list(scenes).index(scene), i, j, 0.5) for scene, i, j in [*LISTED, ("test", 0, 1)]]
    np.savez(root / "all_metadata.npz", scenes=[*scenes.values()], images=names, pairs=np.array(listed, kind))
    return {scene: f"0001/{i}/{{}}_o.jpg.jpg" for i, scene in enumerate("AB")}


def blendedmvs_dust3r(root):
    """The scene that ends with 20 is of the test set and has no files; numbers of scenes take all of 64 bits."""
    scenes = {"A": (0x5A, 2**63 + 3), "B": (0x5B, 7), "test": (0x5C, 20)}
    kind = [("seq_high", "u4"), ("seq_low", "u8"), ("img1", "i4"), ("img2", "i4"), ("score", "f4")]
    listed = [(*scenes[scene], NUMBERS[i], NUMBERS[j], 0.5) for scene, i, j in [*LISTED, ("test", 0, 1)]]
    np.save(root / "blendedmvs_pairs.npy", np.array(listed, kind))
    return {scene: f"{scenes[scene][0]:08x}{scenes[scene][1]:016x}/{{:08d}}.jpg" for scene in "AB"}


def realestate10k_pairs(root):
    pairs = [[SHOTS[i] for i in ends] for _, *ends in LISTED]
    np.savez(
        root / "train_metadata_pairs.npz", allow_pickle=True,
        img_pairs=objects([[f"{scene}/{NUMBERS[i]}.jpg" for i in ends] for scene, *ends in LISTED]),
        camera_params=objects([[shot.K for shot in pair] for pair in pairs]),
        w2c=objects([[shot.T[:3] for shot in pair] for pair in pairs]),
    )  # fmt: skip
    return {scene: f"images/{scene}/{{}}.jpg" for scene in "AB"}


def dl3dv_pairs(root):
    def opengl(shot):
        """The pose that Reloc3r turns into that of the shot, step by step."""
        pose = np.linalg.inv(shot.T)
        pose[0:3, 1:3] *= -1
        pose = pose[[1, 0, 2, 3], :]
        pose[2, :] *= -1
        return pose

    listed = [
        (scene, i, j, f"images_8/{NUMBERS[i]}.jpg", f"images_8/{NUMBERS[j]}.jpg", opengl(SHOTS[i]), opengl(SHOTS[j]),
         SHOTS[i].K)
        for scene, i, j in LISTED
    ]  # fmt: skip
    (root / "metadata_train.pkl").write_bytes(pickle.dumps(listed))
    return {scene: f"1K/{scene}/images_8/{{}}.jpg" for scene in "AB"}


def write(name, root):
    """The images of a list, for DUSt3R's with their cameras, and the list; returns the shots by path."""
    paths, shots = globals()[name](root), {}
    for scene, i in {(scene, i) for scene, *ends in LISTED for i in ends} - {("A", 1)}:
        file, shot = root / paths[scene].format(NUMBERS[i]), SHOTS[i]
        file.parent.mkdir(parents=True, exist_ok=True)
        shot.image().save(file)
        shots[str(file.relative_to(root))] = shot
        if name.endswith("dust3r"):
            K, pose = shot.K - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]], np.linalg.inv(shot.T)
            parts = {"R_cam2world": pose[:3, :3], "t_cam2world": pose[:3, 3]}
            cameras = {"cam2world": pose} if name.startswith("megadepth") else parts
            np.savez(file.with_suffix(".npz"), intrinsics=K, **cameras)
    return paths, shots


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_pairs_of_a_list_are_drawn(name, tmp_path, caplog):
    (root := tmp_path / "raw").mkdir()
    paths, shots = write(name, root)
    build(name, root, tmp_path / "m.arrow", dataset="dl3dv")  # the name that data.weights has, and GAPS
    assert "1 of 6 images" in caplog.text
    manifests = Manifests([tmp_path / "m.arrow"])
    held = manifests.parts[0].paths("path", np.arange(manifests.num_frames))
    listed = {tuple(paths[scene].format(i) for i in pair) for scene, *pair in FOUND}
    assert held == [paths["A"].format(i) for i in (2, 9, 11)] + [paths["B"].format(i) for i in (9, 10)]
    assert len(set(manifests.scene_names(np.arange(2)))) == (1 if name == "megadepth_dust3r" else 2)

    planner = PairPlanner(manifests, None, 64, (32, 32), overlap=(1, 1), augment=False)
    plan = planner.plan(0)
    drawn = [(held[a], held[b]) for a, b in plan.rows.reshape(-1, 2)]
    assert {*drawn} == {pair[::step] for pair in listed for step in (1, -1)}
    for row, path in enumerate(held):
        frame = manifest_frame(manifests, row)
        assert pytest.approx(shots[path].K, abs=1e-4) == frame.K
        other = manifest_frame(manifests, 0)
        expected = relative_pose(shots[held[0]].T, shots[path].T)
        assert relative_pose(other.camera_from_world, frame.camera_from_world) == pytest.approx(expected, abs=1e-5)
    assert PairLoader((planner, None), 1).load(plan).images.shape == (128, 32, 32, 3)
    only = PairPlanner(manifests, None, 64, (32, 32), only=[1], augment=False).plan(0).rows
    assert {*manifests.sequence_of(only)} == {1}

    for settings in ({"sampling": "distance"}, {"gaps": {"dl3dv": (1, 1)}}):
        assert isinstance(PairPlanner(manifests, None, 2, (32, 32), **settings).pairs[0], DistantPairs)
    with pytest.raises(DataError, match="depth"):
        RomaPlanner(
            manifests, None, 2, (32, 32), sampling="overlap", depth=True, second_overlap=0.3, shift=0, flip=False
        )


@pytest.mark.parametrize("name", ["megadepth_dust3r", "dl3dv_pairs"])
def test_files_named_as_in_the_fork_of_mum(name, tmp_path):
    """Names without the list's suffix; scenes with their parent folder."""
    write(name, tmp_path)
    build(name, tmp_path, tmp_path / "before.arrow")
    expected = rows_of_list(before := Manifests([tmp_path / "before.arrow"]), name)
    if name == "dl3dv_pairs":
        file = tmp_path / "metadata_train.pkl"
        file.write_bytes(pickle.dumps([(f"7K/{each[0]}", *each[1:]) for each in pickle.loads(file.read_bytes())]))
        (tmp_path / "1K").rename(tmp_path / "7K")
    else:
        for file in [*tmp_path.glob("0001/*/*_o.jpg.*")]:
            file.rename(file.with_name(file.name.replace(".jpg.", ".")))
    build(name, tmp_path, tmp_path / "after.arrow")
    after = Manifests([tmp_path / "after.arrow"])
    assert np.array_equal(rows_of_list(after, name), expected)
    for row in range(5):
        frames = [manifest_frame(each, row) for each in (before, after)]
        assert frames[1].file.is_file()
        assert np.array_equal(*(each.K for each in frames))
        assert np.array_equal(*(each.camera_from_world for each in frames))


def test_lists_in_stores_beside_other_manifests(tmp_path):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    names = ["realestate10k_pairs", "dl3dv_pairs"]
    for name in names:
        (tmp_path / name).mkdir()
        write(name, tmp_path / name)
        build(name, tmp_path / name, tmp_path / f"{name}.arrow")
    memory.put(f"{tmp_path / names[1]}/", "/dl3dv", recursive=True)
    roots = {names[1]: "memory://dl3dv"}
    manifests = Manifests([tmp_path / f"{name}.arrow" for name in names], roots)
    (tmp_path / names[1] / "metadata_train.pkl").unlink()
    first, second = (rows_of_list(manifests, name) for name in names)
    assert (second == first + 5).all()
    memory.rm("/dl3dv", recursive=True)


def damaged(root, name, **arrays):
    with np.load(root / name, allow_pickle=True) as held:
        content = dict(held) | arrays
    np.savez(root / name, **{key: value for key, value in content.items() if value is not None})


def negative(root):
    pairs = np.load(root / "all_metadata.npz")["pairs"]
    pairs["im2_id"][1] = -1
    damaged(root, "all_metadata.npz", pairs=pairs)


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("megadepth_dust3r", lambda root: damaged(root, "all_metadata.npz", pairs=None), "all_metadata.*no pairs"),
        ("megadepth_dust3r", lambda root: damaged(root, "all_metadata.npz", pairs=np.eye(2)), "all_metadata.*list"),
        ("megadepth_dust3r", negative, "all_metadata.*negative"),
        ("megadepth_dust3r", lambda root: (root / "0001/0/9_o.jpg.npz").unlink(), "0001/0/9_o.jpg.npz"),
        ("megadepth_dust3r", lambda root: damaged(root, "0001/0/9_o.jpg.npz", cam2world=np.eye(3)), "9_o.jpg.npz"),
        ("blendedmvs_dust3r", lambda root: np.save(root / "blendedmvs_pairs.npy", np.eye(2)), "blendedmvs_pairs"),
        ("realestate10k_pairs", lambda root: damaged(root, "train_metadata_pairs.npz", w2c=np.eye(2)), "train_meta"),
        ("realestate10k_pairs", lambda root: (root / "train_metadata_pairs.npz").write_text("PK"), "train_metadata"),
        ("dl3dv_pairs", lambda root: (root / "metadata_train.pkl").write_bytes(pickle.dumps([("A",)])), "train.pkl"),
        ("dl3dv_pairs", lambda root: (root / "metadata_train.pkl").write_bytes(pickle.dumps(Hostile())), "exec"),
    ],
)
def test_damaged_files_are_named(name, damage, message, tmp_path):
    write(name, tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=rf"^[^\n]*{message}[^\n]*$"):
        build(name, tmp_path, tmp_path / "m.arrow")


def test_a_list_of_other_images_is_refused(tmp_path):
    write("dl3dv_pairs", tmp_path)
    build("dl3dv_pairs", tmp_path, tmp_path / "m.arrow")
    file = tmp_path / "metadata_train.pkl"
    file.write_bytes(pickle.dumps([("C", *each[1:]) for each in pickle.loads(file.read_bytes())]))
    with pytest.raises(DataError, match=r"metadata_train\.pkl.*m\.arrow.*build it again"):
        PairPlanner(Manifests([tmp_path / "m.arrow"]))


def test_a_list_that_was_replaced_is_said_when_a_run_resumes(tmp_path, caplog):
    write("dl3dv_pairs", tmp_path)
    build("dl3dv_pairs", tmp_path, tmp_path / "m.arrow", dataset="mine")
    args = tmp_path / "run", f"data.manifests=[{tmp_path / 'm.arrow'}]", "data.held_out=0"
    train_tiny(*args)
    train_tiny(*args, "train.steps=2")
    assert "pairs of" not in caplog.text
    file = tmp_path / "metadata_train.pkl"
    file.write_bytes(pickle.dumps(pickle.loads(file.read_bytes())[:-1]))
    train_tiny(*args, "train.steps=3")
    assert "pairs of 'mine'" in caplog.text

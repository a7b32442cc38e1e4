"""Miniatures of the real layouts, written from a wall whose warps are known."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from plane_world import Shot, exact, shot, walk
from scipy.spatial.transform import Rotation

from fastmum.data.errors import DataError
from fastmum.evaluate.features import load_image
from fastmum.evaluate.pairs import SETS, open_pairs, overlap, pair_warp, same_set
from fastmum.evaluate.pairs.jsonl import split
from fastmum.evaluate.pairs.pair import read_archive, read_json, read_table
from fastmum.evaluate.pairs.scenes import embedded_folders, from_folders
from fastmum.geometry.warp import grid_points


def check(pair, a: Shot, b: Shot) -> None:
    """The pair's warp is the wall's, to 0.3 pixels of 448."""
    warp = pair_warp(pair, 8, 8)
    error = np.abs(warp.points.numpy() - exact(a, b, grid_points(8, 8).numpy()))[warp.visible.numpy()] * 448
    assert warp.visible.double().mean() > 0.3
    assert error.max() < 0.3
    for frame, camera in ((pair.a, a), (pair.b, b)):
        assert np.abs(np.asarray(frame.read_image(), int) - np.asarray(camera.image(), int)).mean() < 6  # JPEG


def objects(values: list) -> np.ndarray:
    return np.fromiter(values, object, len(values))


def names(root: Path | str, part: str = "all") -> list[str]:
    return [pair.name for pair in open_pairs(str(root), part).pairs]


def megadepth(root: Path, scene: str, shots: list[Shot]) -> dict:
    """Images and depth of a scene, and its scene information without pairs; image 0 is missing, as many are."""
    images, depths = [None], [None]
    for i, camera in enumerate(shots[1:], 1):
        images.append(f"Undistorted_SfM/{scene}/images/{i}_o.jpg")
        depths.append(f"phoenix/S6/zl548/MegaDepth_v1/{scene}/dense0/depths/{i}_o.h5")
        camera.save(root / images[-1], root / depths[-1], camera.depth())
    poses, intrinsics = ([None, *(getattr(camera, name) for camera in shots[1:])] for name in ("T", "K"))
    named = {"image_paths": images, "depth_paths": depths, "poses": poses, "intrinsics": intrinsics}
    return {name: objects(values) for name, values in named.items()}


PAIR_INFOS = objects([((1, 2), 0.2, np.zeros((0, 4))), ((4, 3), 0.25, np.zeros((0, 4)))])


@pytest.mark.parametrize(("folder", "images"), [("", "test"), ("megadepth_test_1500_scene_info", "")])
def test_megadepth_of_loftr(tmp_path, folder, images):
    shots = walk(5)
    (tmp_path / folder).mkdir(exist_ok=True)
    for scene in ("0015", "0022"):
        information = megadepth(tmp_path / images, scene, shots)
        np.savez(tmp_path / folder / f"{scene}_0.1_0.3.npz", **information, pair_infos=PAIR_INFOS)
    pairs = open_pairs(str(tmp_path))
    assert (pairs.name, pairs.size) == ("megadepth", 448)
    assert [pair.scene for pair in pairs.pairs] == 2 * ["0015"] + 2 * ["0022"]
    check(pairs.pairs[0], shots[1], shots[2])
    check(pairs.pairs[1], shots[4], shots[3])
    (tmp_path / "megadepth_test_pairs.txt").write_text("")  # Reloc3r's list has no depth
    assert (drawn := open_pairs(str(tmp_path), matchbench=True)).name == "megadepth_random", "they are DKM's"
    assert len(drawn.pairs) == 4
    with pytest.raises(DataError, match="--train-data"):
        open_pairs(str(tmp_path), "train")


def test_megadepth_of_dkm(tmp_path, caplog):
    shots = walk(4)
    (tmp_path / "prep_scene_info").mkdir()
    for scene in ("0015", "0003", "0008", "5016"):
        information = megadepth(tmp_path, scene, shots)
        information |= {"pairs": np.array([[1, 2], [2, 3], [3, 1]]), "overlaps": np.array([0.5, 0.005, 0.2])}
        np.save(tmp_path / "prep_scene_info" / f"{scene}.npy", information)
    assert names(f"megadepth:{tmp_path}", "test") == ["0015/1-2", "0015/2-3", "0015/3-1"]
    # Enough overlap, and no scene that RoMa leaves out.
    test, train = (open_pairs(str(tmp_path), part) for part in ("test", "train"))
    assert (test.name, open_pairs(str(tmp_path), matchbench=True).name) == ("megadepth_random", "megadepth")
    assert "random pairs" in caplog.text
    assert names(tmp_path, "trainable") == [pair.name for pair in train.pairs] == ["0003/1-2", "0003/3-1"]
    check(train.pairs[1], shots[3], shots[1])
    assert overlap(train, test) is None
    assert overlap(test, test) == "scene '0015'"


def test_megadepth_of_reloc3r_has_no_depth(tmp_path):
    shots, cameras = walk(3), {}
    for i, camera in enumerate(shots):
        name = f"0015/images/{i}_o.jpg"
        camera.save(tmp_path / name, tmp_path / "unused.png", camera.depth())
        cameras[name] = np.array({"intrinsic": camera.K, "pose": camera.T}, object)
    np.savez(tmp_path / "megadepth_meta_test.npz", **cameras)
    lines = [f"0015/images/{i}_o.jpg 0015/images/{j}_o.jpg\n" for i, j in ((0, 1), (2, 0))]
    (tmp_path / "megadepth_test_pairs.txt").write_text("".join(lines))
    for name in (tmp_path, f"megadepth:{tmp_path}"):
        found = open_pairs(str(name), needs_depth=False)
        assert (found.name, len(found.pairs)) == ("megadepth", 2)
        refused(name, "no depth.*evaluate pose")
    for pair, a, b in zip(found.pairs, (shots[0], shots[2]), (shots[1], shots[0]), strict=True):
        assert pytest.approx(b.T @ np.linalg.inv(a.T)) == pair.T_b_a
        assert (pair.a.K == a.K).all()
        assert pair.b.file.is_file()
    np.savez(tmp_path / "megadepth_meta_test.npz", **{name: cameras[name] for name in sorted(cameras)[1:]})
    refused(tmp_path, r"megadepth_meta_test\.npz.*0_o\.jpg", needs_depth=False)


def scannet(scene: Path, shots: dict[int, Shot], K_depth: np.ndarray) -> None:
    for folder in ("pose", "intrinsic"):
        (scene / folder).mkdir(parents=True)
    for index, camera in shots.items():
        camera.save(scene / f"color/{index}.jpg", scene / f"depth/{index}.png", 1000 * camera.depth())
        np.savetxt(scene / f"pose/{index}.txt", np.linalg.inv(camera.T))
    for name, K in (("color", shots[0].K), ("depth", K_depth)):
        np.savetxt(scene / f"intrinsic/intrinsic_{name}.txt", np.pad(K, (0, 1)) + np.diag([0, 0, 0, 1]))


@pytest.mark.parametrize("folder", ["scans_test", ""])
def test_scannet_of_roma(tmp_path, folder):
    shots, scene, files = walk(4), tmp_path / folder / "scene0707_00", tmp_path / "scannet_indices"
    scannet(scene, dict(zip((0, 15, 30, 45), shots, strict=True)), np.diag([20, 20, 1]))
    np.savetxt(scene / "pose/45.txt", np.full((4, 4), -np.inf))  # tracking was lost
    listed = np.array([[707, 0, 15, 30], [707, 0, 0, 45], [707, 0, 30, 0]])
    np.savez(tmp_path / "test.npz", name=listed, rel_pose=np.zeros((3, 12)))
    pairs = open_pairs(str(tmp_path))
    assert (pairs.name, names(tmp_path)) == ("scannet", ["scene0707_00/15-30", "scene0707_00/30-0"])
    check(pairs.pairs[0], shots[1], shots[2])
    check(pairs.pairs[1], shots[2], shots[0])
    with pytest.raises(DataError, match="--train-data"):
        open_pairs(str(tmp_path), "train")
    scannet(tmp_path / "scans/scans_train/scene0001_00", dict(zip((0, 10, 25), shots[:3], strict=True)), np.eye(3))
    files.mkdir()
    listed, scores = np.array([[1, 0, 0, 10], [1, 0, 10, 25], [1, 0, 10, 0]]), np.array([0.6, 0.6, 0.2])
    np.savez(files / "scene0001_00.npz", name=listed, score=scores)
    assert names(f"scannet:{tmp_path}", "train") == names(tmp_path, "trainable") == ["scene0001_00/0-10"]
    check(open_pairs(str(tmp_path), "train").pairs[0], *shots[:2])


def test_scannet_of_loftr_with_intrinsics_of_depth(tmp_path):
    """Images in the size of depth take the intrinsics of depth, which LoFTR keeps for all scenes in one file."""
    shots, root = walk(2), tmp_path / "scannet_test_1500"
    scannet(root / "scene0708_01", {0: shots[0], 100: shots[1]}, np.eye(3))
    (root / "scene0708_01/intrinsic/intrinsic_depth.txt").unlink()
    K_color = np.diag([2, 2, 1]) @ shots[0].K
    np.savetxt(root / "scene0708_01/intrinsic/intrinsic_color.txt", np.pad(K_color, (0, 1)))
    np.savez(root / "test.npz", name=np.array([[708, 1, 0, 100]]))
    np.savez(root / "intrinsics.npz", scene0708_01=shots[0].K)
    check(open_pairs(str(tmp_path)).pairs[0], *shots)
    # Without those of colour they are of a depth image of 640 x 480, whatever the size of the colour image.
    (root / "scene0708_01/intrinsic/intrinsic_color.txt").unlink()
    width, height = shots[0].size
    np.savez(root / "intrinsics.npz", scene0708_01=np.diag([640 / width, 480 / height, 1]) @ shots[0].K)
    check(open_pairs(str(tmp_path)).pairs[0], *shots)


def test_navi(tmp_path):
    """One object: a piece of the wall at a tenth of its distance before nothing; images are wider than high."""
    shots = [shot((0.03 * i, 0.02 * i, 0), (0.02 * i, -0.03 * i, 0.05 * i), (96, 64), 80) for i in range(9)]
    folder = tmp_path / "keywest_showpiece_cat/wild_set"
    y, x = np.mgrid[:64, :96]
    known = (np.abs(x - 50) <= 14) & (np.abs(y - 30) <= 18)
    annotations = []
    for i, camera in enumerate(shots):
        counts = np.where(known, 655350 / (100 * camera.depth()), 0)  # 100 mm per unit of the wall's world
        camera.save(folder / f"images/{i:03d}.jpg", folder / f"depth/{i:03d}.png", counts)
        q = 2 * Rotation.from_matrix(camera.T[:3, :3]).as_quat()[[3, 0, 1, 2]]  # need not have length 1
        pose = {"q": q.tolist(), "t": (100 * camera.T[:3, 3]).tolist(), "focal_length": 80.0}
        annotations.append({"filename": f"{i:03d}.jpg", "image_size": [64, 96], "camera": pose})
    (folder / "annotations.json").write_text(json.dumps(annotations))
    pairs = open_pairs(str(tmp_path))
    assert (pairs.name, pairs.size, pairs.objects) == ("navi", 512, True)
    assert [Path(pair.a.key).name for pair in pairs.pairs] == ["000.jpg", "004.jpg", "008.jpg"]
    for pair in pairs.pairs:
        view = pair.a.view()  # the object is 29 x 37 pixels
        assert view.size == view.camera.size == view.depth.shape == (37, 37)
        ends = [shots[int(Path(frame.key).stem)] for frame in (pair.a, pair.b)]
        warp = pair_warp(pair, 8, 8)
        corner, side = np.array([32, 12]), 37  # the crop is around (50.5, 30.5)
        whole = (corner + side * grid_points(8, 8).numpy()) / [96, 64]
        truth = (exact(*ends, whole) * [96, 64] - corner) / side
        assert np.abs(warp.points.numpy() - truth)[warp.visible.numpy()].max() * 37 < 0.3
    assert names(tmp_path) == [pair.name for pair in pairs.pairs]  # the same partners every time


def test_pairs_in_a_text_file(wall_file, caplog, monkeypatch):
    """Depth in arrays is taken as it is, counts of PNGs as millimetres, unless the record says otherwise."""
    folder, shots = wall_file.parent, walk(16)
    monkeypatch.chdir(folder)
    for name in (str(wall_file), str(wall_file.parent), f"pairs:{wall_file}", "pairs.jsonl", "."):
        pairs = open_pairs(name)
        assert (pairs.name, len(pairs.pairs)) == ("wall", 8)
    check(pairs.pairs[3], shots[6], shots[7])
    parts = [open_pairs(name, part).pairs for part in ("test", "train")]
    assert [len(part) for part in parts] == [4, 4]
    assert len({frame.key for part in parts for pair in part for frame in (pair.a, pair.b)}) == 16
    assert len(open_pairs(name, "trainable").pairs) == 8
    for key in ("set", "scene"):
        spoil(wall_file, **{key: key})
        assert [pair.scene for pair in open_pairs(name).pairs[1:3]] == ["pairs", key]
    np.save(folder / "4.npy", shots[4].depth())
    shots[5].save(folder / "5.png", folder / "5.h5", shots[5].depth())
    spoil(wall_file, depth_a="4.npy", depth_b="5.h5")
    check(open_pairs(str(wall_file)).pairs[2], shots[4], shots[5])
    np.save(folder / "4.npy", shots[4].depth() * 10)
    spoil(wall_file, depth_a="4.npy", depth_b="5_depth.png", depth_unit=0.1)
    pair = open_pairs(str(wall_file)).pairs[2]
    assert np.allclose(pair.a.read_depth(), shots[4].depth(), rtol=1e-5)
    assert np.allclose(pair.b.read_depth(), 100 * shots[5].depth(), atol=0.1)
    spoil(wall_file, depth_b=None)
    assert len(names(wall_file)) == 7
    assert "1 of 8 pairs" in caplog.text


def test_project_pairs(shared):
    """The project's own set: real pictures, metric depth."""
    pairs = open_pairs(str(shared / "data/pairs/pairs.jsonl"))
    assert len(pairs.pairs) == 16
    shares = torch.stack([pair_warp(pair, 14, 14).visible.double().mean() for pair in pairs.pairs])
    assert shares.min() > 0.02
    assert shares.mean() > 0.15


def spoil(file: Path, **changes) -> None:
    lines = file.read_text().splitlines()
    record = json.loads(lines[2]) | changes
    lines[2] = json.dumps({key: value for key, value in record.items() if value is not None})
    file.write_text("\n".join(lines))


def refused(root: Path | str, message: str, **options) -> None:
    with pytest.raises(DataError, match=message):
        open_pairs(str(root), **options)


def test_records_and_files_that_cannot_be_used(wall_file):
    lines = wall_file.read_text()
    for changes, message in (
        ({"K_a": None}, "line 3 .* K_a"),
        ({"K_a": [[1, 0], [0, 1]]}, "K_a in line 3"),
        ({"T_b_a": np.diag([1.0, 1, 0, 1]).tolist()}, "T_b_a in line 3 .* singular"),
        ({"T_b_a": [[float("nan")] * 4] * 4}, "T_b_a in line 3 .* finite"),
        ({"T_b_a": np.diag([1.0, 1, -1, 1]).tolist()}, "T_b_a in line 3 .* mirrors"),
        ({"T_b_a": np.diag([1.1, 1.1, 1.1, 1]).tolist()}, "T_b_a in line 3 .* scales"),
        ({"image_b": "nothing.png"}, "nothing.png"),
        ({"image_b": 7}, "7, named in"),
        ({"depth_b": "pairs.jsonl"}, "pairs.jsonl"),
        ({"id": "pair 0"}, "line 3 .* 'pair 0' of line 1"),
        ({"depth_unit": "millimetres"}, "depth_unit in line 3"),
    ):
        wall_file.write_text(lines)
        spoil(wall_file, **changes)
        refused(wall_file, message)
    wall_file.write_text(lines)
    pairs = open_pairs(str(wall_file)).pairs
    for file, read in (("0.png", lambda: load_image(pairs[0].a, 32)), ("3_depth.png", pairs[1].b.read_depth)):
        (wall_file.parent / file).write_bytes(b"nothing")
        with pytest.raises(DataError, match=file):
            read()
    wall_file.write_text("{")
    refused(wall_file, "line 1 of")


def test_archives_run_no_code_and_allocate_no_more_than_they_hold(tmp_path):
    class Hostile:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'mark')!r}, 'w')",)

    good = {"a": np.eye(2), "b": objects([None, "x", (np.arange(2), np.float64(0.5))])}
    np.savez(tmp_path / "good.npz", **good)
    np.save(tmp_path / "good.npy", good)
    np.savez(tmp_path / "bad.npz", **good, c=objects([Hostile()]))
    np.save(tmp_path / "bad.npy", {"a": Hostile()})
    for suffix in ("npz", "npy"):
        found = read_archive(tmp_path / f"good.{suffix}")
        assert np.array_equal(found["a"], np.eye(2))
        assert found["b"][1] == "x"
        assert found["b"][2][1] == 0.5
        with pytest.raises(DataError, match=rf"bad.{suffix}.*exec"):
            read_archive(tmp_path / f"bad.{suffix}")
    assert not (tmp_path / "mark").exists()


def test_byte_order_marks(wall_file, tmp_path):
    wall_file.write_bytes(b"\xef\xbb\xbf" + wall_file.read_bytes().replace(b"\n", b"\r\n"))
    assert len(names(wall_file)) == 8
    (tmp_path / "table.txt").write_text("\ufeff1 2\n3 4\n")
    assert read_table(tmp_path / "table.txt", (2, 2)).tolist() == [[1, 2], [3, 4]]
    (tmp_path / "a.json").write_text("\ufeff[1]")
    assert read_json(tmp_path / "a.json") == [1]


def test_unknown_names_broken_files_and_singular_cameras_are_named(tmp_path):
    kinds = [f"{kind}:{tmp_path}" for kind, layout in SETS.items() if layout.open]
    for name in ("nowhere", "megadepth", "motorcycle:/x", "scenes:/nowhere", str(tmp_path), *kinds):
        refused(name, name.rpartition(":")[2])
    no_focal = {"filename": "a.jpg", "image_size": [1, 1], "camera": {"q": [1, 0, 0, 0], "focal_length": 0}}
    for i, (name, content, message) in enumerate((
        ("cat/wild_set/annotations.json", '[{"filename": "0.jpg"}]', "annotations.json"),
        ("cat/wild_set/annotations.json", json.dumps([no_focal]), "'a.jpg' in '.*annotations.json'"),
        ("scene_0000/cameras.json", '{"depth_unit": "x"}', "cameras.json"),
        ("scene_0000/cameras.json", "{", "cameras.json"),
        ("0015_0.1_0.3.npz", "nothing", "0015_0.1_0.3.npz"),
    )):  # fmt: skip
        file = tmp_path / str(i) / name
        file.parent.mkdir(parents=True)
        file.write_text(content)
        refused(tmp_path / str(i), message)
    np.savez(file, poses=np.zeros(3))
    refused(file.parent, file.name)
    shots = walk(3)
    for key, what in (("poses", "pose 1 in"), ("intrinsics", "intrinsics 1 in")):
        information = megadepth(tmp_path / key, "0015", shots)
        information[key][1] = np.zeros_like(information[key][1])
        np.savez(tmp_path / key / file.name, **information, pair_infos=PAIR_INFOS[:1])
        refused(tmp_path / key, f"{what} '.*{file.name}'")
    for name, shape in (("pose/15.txt", (4, 4)), ("intrinsic/intrinsic_color.txt", (3, 3))):
        root = tmp_path / Path(name).stem
        scannet(root / "scene0707_00", dict(zip((0, 15, 30), shots, strict=True)), np.eye(3))
        np.savez(root / "test.npz", name=np.array([[707, 0, 0, 15]]))
        np.savetxt(root / "scene0707_00" / name, np.zeros(shape))
        refused(root, f"scene0707_00/{name}")


def test_rendered_scenes_are_split_by_scene_and_shared_under_any_name(rendered, wall_file, tmp_path):
    """Scene names mean nothing across folders, files do."""
    test, train, everything = (open_pairs(str(rendered), part) for part in ("test", "train", "all"))
    assert [{pair.scene for pair in part.pairs} for part in (train, test)] == [{"scene_0000"}, {"scene_0001"}]
    assert len(everything.pairs) == len(test.pairs) + len(train.pairs) == len(names(rendered, "trainable"))
    again = shutil.copytree(rendered, tmp_path / "again")
    assert overlap(train, test) is overlap(everything, open_pairs(str(again))) is None
    (tmp_path / "link").symlink_to(rendered)
    assert overlap(open_pairs(str(tmp_path / "link")), test) == "scene 'scene_0001'"
    text = "".join(wall_file.read_text().splitlines(True)[5:])
    (tmp_path / "mine.jsonl").write_text(text.replace('a": "', 'a": "wall/').replace('b": "', 'b": "wall/'))
    shared = overlap(open_pairs(str(tmp_path / "mine.jsonl")), open_pairs(str(wall_file)))
    assert shared == f"picture '{(wall_file.parent / '10.png').resolve()}'"
    same = ["scenes"], [str(wall_file), f"{wall_file.parent}/", f"pairs:{wall_file}"], ["motorcycle"], [str(rendered)]
    for one, other in itertools.product(same, same):
        assert {same_set(*words) for words in itertools.product(one, other)} == {one is other}


def test_embedded_scenes_to_test_and_to_train_on_differ(rendered, monkeypatch):
    folders = {"train": [rendered / "scene_0000"], "all": [rendered / "scene_0001"]}
    monkeypatch.setattr("fastmum.evaluate.pairs.scenes.embedded_folders", folders.__getitem__)
    for name in ("scenes", "motorcycle"):
        assert {pair.scene for pair in open_pairs(name, "trainable").pairs} == {"scene_0000"}
    monkeypatch.setattr("fastmum.evaluate.pairs.scenes.ensure_scenes", lambda count, views, size, seed: seed)
    monkeypatch.setattr("fastmum.evaluate.pairs.scenes.scene_dirs", lambda root, count: (root, count))
    assert embedded_folders("test") == embedded_folders("all") != embedded_folders("train")
    assert len({0, embedded_folders("test")[0], embedded_folders("train")[0]}) == 3  # 0: the default of training


def test_pairs_are_spread_over_the_path(rendered):
    for starts in (1, 2, 4, 9):
        pairs = from_folders([rendered / "scene_0000"], gaps=(1, 2, 6), starts=starts).pairs  # of 6 views
        assert len({pair.name for pair in pairs}) == len(pairs) == min(starts, 5) + min(starts, 4)
    assert [pair.name[-7:] for pair in pairs[:5]] == ["000-001", "001-002", "002-003", "003-004", "004-005"]


def test_some_pairs_of_a_set(wall_pairs):
    assert [len(part) for part in split(wall_pairs.pairs)] == [5, 0]  # pairs that share pictures stay together
    assert [len(part) for part in split(wall_pairs.pairs[::2])] == [2, 1]
    assert [pair.name for pair in wall_pairs.first(2).pairs] == ["0-1", "4-5"]
    assert wall_pairs.first(9) is wall_pairs.first(None) is wall_pairs
    both = wall_pairs.both_ways().pairs
    assert len(both) == 10
    assert np.allclose(both[0].T_b_a @ both[1].T_b_a, np.eye(4))

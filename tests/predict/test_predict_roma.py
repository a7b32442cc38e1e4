"""Prediction of matches: files of a pair, a COLMAP database of a folder, keypoints, and a model of true matches."""

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image
from roma_runs import train_tiny

from fastmum.data.decode.image import read_upright
from fastmum.errors import FastmumError
from fastmum.evaluate.pairs import pair_warp, scenes
from fastmum.features.images import find_images
from fastmum.geometry.warp import grid_points
from fastmum.predict.__main__ import main
from fastmum.predict.matches_db import PairMatches, import_images, merge_points, one_to_one, write_matches
from fastmum.predict.roma import match_pairs, read_pairs, write_database, write_pair
from fastmum.scenes import ensure_scenes, scene_dirs
from fastmum.tasks.roma.coarse import grid
from fastmum.tasks.roma.infer import Warps


def identity(certainty: float = 1.0) -> Warps:
    points = grid((16, 16))[0].permute(1, 2, 0).expand(2, -1, -1, -1)
    return Warps(points, torch.full((2, 16, 16), certainty))


def test_files_of_a_pair_are_in_pixels_of_the_originals(tmp_path):
    images = [np.full((40, 60, 3), 90, np.uint8), np.full((80, 30, 3), 200, np.uint8)]
    matches = torch.tensor([[-1.0, -1.0, 0.0, 0.0], [0.5, 0.0, 1.0, 1.0]])
    write_pair(tmp_path, images, identity(), matches, torch.ones(2))
    found = np.load(tmp_path / "matches.npz")
    assert found["first"].tolist() == [[0, 0], [45, 20]]
    assert found["second"].tolist() == [[15, 40], [30, 80]]
    warp = np.load(tmp_path / "warp.npz")
    assert warp["first_to_second"].shape == (16, 16, 2)
    assert warp["first_to_second"][0, 0].tolist() == pytest.approx([30 / 32, 80 / 32])
    assert warp["second_to_first"][-1, -1].tolist() == pytest.approx([60 - 60 / 32, 40 - 40 / 32])
    for name in ("warp", "matches"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 100


def test_keypoints_join_the_points_of_all_pairs_and_match_once():
    a = np.array([[0.5, 0.5], [10.2, 3.0]], np.float32)
    pairs = [
        PairMatches("a", "b", a, a + 5, np.array([0.9, 0.8])),
        PairMatches("c", "a", a + 1, a + 0.5, np.array([0.9, 0.8])),
    ]
    keypoints, numbers = merge_points(pairs, ["a", "b", "c"], cell=2.0)
    assert [len(keypoints[name]) for name in "abc"] == [2, 2, 2]
    assert keypoints["a"] == pytest.approx(a + 0.25)
    assert numbers[0][0].tolist() == numbers[1][1].tolist() == [0, 1]
    first, second, certainty = np.array([0, 0, 1, 2]), np.array([5, 6, 6, 7]), np.array([0.2, 0.9, 0.8, 0.1])
    assert one_to_one(first, second, certainty).tolist() == [[0, 6], [2, 7]]


def test_lists_of_pairs_and_unreadable_images(tmp_path):
    for name in ("a.png", "b.png", "of b.png"):
        Image.linear_gradient("L").resize((20, 20)).save(tmp_path / name)
    Image.new("RGB", (20, 20)).save(tmp_path / "black.png")
    (tmp_path / "c.png").write_bytes(b"nothing")
    images = find_images([str(tmp_path)])
    listed = tmp_path / "pairs.txt"
    listed.write_text("a.png b.png\n\nb.png c.png\nb.png a.png\nblack.png a.png\n")  # each pair counts once
    pairs = read_pairs(listed, images)
    assert [[file.name for file in pair] for pair in pairs] == [
        ["a.png", "b.png"],
        ["b.png", "c.png"],
        ["black.png", "a.png"],
    ]
    found = match_pairs(images, pairs, lambda a, b: (torch.zeros(1, 4), torch.ones(1)))
    assert [(pair.first, pair.second) for pair in found] == [("a.png", "b.png")]
    assert found[0].points_first.tolist() == [[10, 10]]
    assert sorted(images.skipped) == ["black.png", "c.png"]
    listed.write_text("of b.png\ta.png\na.png  of b.png\nb.png of b.png")  # names with blanks
    assert [{file.name for file in pair} for pair in read_pairs(listed, images)] == [
        {"a.png", "of b.png"},
        {"b.png", "of b.png"},
    ]
    listed.write_text("a.png nothing.png")
    with pytest.raises(FastmumError, match="line 1"):
        read_pairs(listed, images)


def test_points_are_those_of_the_files_as_colmap_reads_them(tmp_path):
    """Of all eight EXIF orientations. Should a version of COLMAP follow the tag, its pixels are others here."""
    blocks = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    stored = Image.fromarray(blocks).resize((80, 48), Image.Resampling.NEAREST)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / f"{orientation}.jpg", exif=exif)
    images = find_images([str(tmp_path)])
    pairs = [(file, images.files[0]) for file in images.files]
    corner = torch.tensor([[-0.9, -0.9] * 2])  # of the upright images
    for found in match_pairs(images, pairs, lambda a, b: (corner, torch.ones(1))):
        file = tmp_path / found.first
        x, y = np.floor(found.points_first[0]).astype(int)
        assert pycolmap.Bitmap.read(file, True).to_array()[y, x] == pytest.approx(read_upright(file)[2, 2], abs=8)


def test_a_database_appears_when_it_is_complete(tmp_path):
    """COLMAP's reading is tried before the first match, and a failure leaves nothing."""
    folder, file = tmp_path / "images", tmp_path / "new/matches.db"
    folder.mkdir()
    texture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for name, more in (("a.jpg", {}), ("turned.jpg", {"exif": exif}), ("z.webp", {})):
        texture.save(folder / name, **more)
    images, matched = find_images([str(folder)]), []
    pairs = [(a, b) for i, a in enumerate(images.files) for b in images.files[i + 1 :]]

    def matcher(a, b, fail=False):
        matched.append((a.shape, b.shape))
        return 1 / 0 if fail else (torch.tensor([[-0.9, -0.9, 0.9, 0.9], [0.9, 0.9, -0.9, 0.9]]), torch.ones(2))

    with pytest.raises(ZeroDivisionError):
        write_database(file, images, pairs, lambda a, b: matcher(a, b, fail=True), 2.0)
    assert not [*file.parent.iterdir()]
    assert write_database(file, images, pairs, matcher, 2.0) == (1, 4, 2)
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    assert matched == [((96, 128, 3), (128, 96, 3))] * 2
    assert [*images.skipped] == ["z.webp"]
    with pycolmap.Database.open(file) as database:
        cameras = {camera.camera_id: camera for camera in database.read_all_cameras()}
        for image in database.read_all_images():
            camera, points = cameras[image.camera_id], database.read_keypoints(image.image_id)
            assert (camera.width, camera.height) == (128, 96)
            assert (points[:, :2] < (128, 96)).all()
    with pytest.raises(FastmumError, match="cannot be written"):
        write_database(folder / "a.jpg/matches.db", images, pairs, matcher, 2.0)


@pytest.mark.slow
def test_colmap_builds_a_model_of_true_matches(tmp_path):
    folder = scene_dirs(ensure_scenes(count=3, views=6, size=64, progress=False), 3)[0]
    pairs = scenes.from_folders([folder], gaps=(1, 2, 3), starts=6).pairs
    points, listed = grid_points(64, 64), []
    for pair in pairs:
        warp = pair_warp(pair, 64, 64)
        a, b = (64 * x[warp.visible].numpy().astype(np.float32) for x in (points, warp.points))
        listed.append(PairMatches(pair.a.file.name, pair.b.file.name, a, b, np.ones(len(a))))
    file = tmp_path / "matches.db"
    ids = import_images(file, folder, sorted(each.name for each in folder.glob("*.png")))
    keypoints, matches = write_matches(file, ids, listed, cell=1.0)
    database = pycolmap.Database.open(file)
    assert database.num_keypoints() == keypoints > 1000
    assert database.num_matches() == matches
    assert database.num_verified_image_pairs() == len(pairs)
    database.close()
    models = pycolmap.incremental_mapping(file, folder, tmp_path / "sparse")
    assert max(model.num_reg_images() for model in models.values()) >= 5


@pytest.mark.slow
def test_commands(tmp_path, capsys, refusal, monkeypatch):
    run = train_tiny(tmp_path / "run")
    scene = scene_dirs(ensure_scenes(count=3, views=6, size=64, progress=False), 3)[0]
    files = [str(scene / f"00{i}.png") for i in range(3)]
    monkeypatch.chdir(tmp_path)
    assert main([str(run), *files[:2], "--matches", "50"]) == 0
    assert np.load("matches/matches.npz")["first"].shape[1] == 2
    database = tmp_path / "new/matches.db"
    words = [str(run), *files, "--colmap", str(database), "--matches", "200", "--certainty", "0", "--one-pass"]
    assert main(words) == 0
    assert "3 of 3 pairs" in capsys.readouterr().out
    opened = pycolmap.Database.open(database)
    assert opened.num_images() == 3
    assert opened.num_matched_image_pairs() == 3
    opened.close()
    assert "exists" in refusal(main, *words)
    assert "--pairs" in refusal(main, run, *files, "--colmap", "new.db", "--matches", 10**8)
    assert "3" in refusal(main, run, *files)
    assert "two images" in refusal(main, run, files[0], "--colmap", "new.db")
    Image.new("RGB", (64, 48)).save("black.png")
    assert "black.png" in refusal(main, run, files[0], "black.png")

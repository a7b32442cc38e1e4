"""What is tested on, what is trained on, and that the two share nothing."""

import shutil

import torch

from fastmum.evaluate.features import load_image
from fastmum.evaluate.pairs import open_pairs, overlap, same_set
from fastmum.evaluate.pairs.scenes import embedded_folders


def test_rendered_scenes_are_split_by_scene(rendered):
    test, train, everything = (open_pairs(str(rendered), part) for part in ("test", "train", "all"))
    assert {pair.scene for pair in test.pairs} == {"scene_0001"}
    assert {pair.scene for pair in train.pairs} == {"scene_0000"}
    assert len(everything.pairs) == len(test.pairs) + len(train.pairs)
    assert len(open_pairs(str(rendered), "trainable").pairs) == len(everything.pairs)
    assert overlap(train, test) is None
    assert overlap(everything, test) == "scene 'scene_0001'"
    assert load_image(test.pairs[0].a, 96).shape == (96, 96, 3)


def test_sets_with_a_test_part_of_their_own_are_trained_on_elsewhere(rendered, monkeypatch):
    folders = {"train": [rendered / "scene_0000"], "all": [rendered / "scene_0001"]}
    monkeypatch.setattr("fastmum.evaluate.pairs.scenes.embedded_folders", folders.__getitem__)
    for name in ("scenes", "motorcycle"):
        assert {pair.scene for pair in open_pairs(name, "trainable").pairs} == {"scene_0000"}


def test_embedded_scenes_to_test_and_to_train_on_differ(monkeypatch):
    monkeypatch.setattr("fastmum.evaluate.pairs.scenes.ensure_scenes", lambda count, *settings: count)
    monkeypatch.setattr("fastmum.evaluate.pairs.scenes.scene_dirs", lambda root, count: list(range(count)))
    assert embedded_folders("test") == embedded_folders("all") == list(range(6))
    assert embedded_folders("train") == list(range(6, 18))


def test_pictures_are_shared_under_any_name(rendered, wall_file, tmp_path):
    """Scene names mean nothing across folders, files do."""
    again = tmp_path / "again"
    shutil.copytree(rendered, again)
    scenes, copied = open_pairs(str(rendered), "all"), open_pairs(str(again), "all")
    assert overlap(scenes, copied) is None
    (tmp_path / "link").symlink_to(rendered)
    assert overlap(open_pairs(str(tmp_path / "link"), "all"), scenes) == "scene 'scene_0000'"
    (tmp_path / "mine.jsonl").write_text(
        "".join(wall_file.read_text().splitlines(True)[5:])
        .replace('a": "', 'a": "wall/')
        .replace('b": "', 'b": "wall/')
    )
    shared = overlap(open_pairs(str(tmp_path / "mine.jsonl")), open_pairs(str(wall_file)))
    assert shared == f"picture '{(wall_file.parent / '10.png').resolve()}'"


def test_names_of_one_set(rendered, wall_file, tmp_path):
    names = [str(wall_file), str(wall_file.parent), f"{wall_file.parent}/", f"pairs:{wall_file}"]
    assert all(same_set(one, other) for one in names for other in names)
    assert same_set("scenes", "scenes")
    assert not same_set("scenes", "motorcycle")
    assert not same_set("scenes", str(rendered))
    assert not same_set(str(rendered), str(wall_file))


def test_some_pairs_of_a_set(wall_pairs):
    assert [pair.name for pair in wall_pairs.first(2).pairs] == ["0-1", "4-5"]
    assert wall_pairs.first(9) is wall_pairs.first(None) is wall_pairs
    both = wall_pairs.both_ways().pairs
    assert len(both) == 10
    assert torch.equal(torch.from_numpy(both[0].T_b_a @ both[1].T_b_a).round(decimals=9), torch.eye(4).double())

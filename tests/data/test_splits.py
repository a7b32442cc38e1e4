"""Training and held-out data of a run, from its configuration."""

import json
import logging
import shutil

import numpy as np
import pytest

from fastmum.config import load_config
from fastmum.data.build import build
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord, write_manifest
from fastmum.data.splits import held_out, open_splits

SETTINGS = ["data.views=[2,3]", "data.frames_per_batch=6", "data.held_out=0.3"]


def sources(tmp_path, *words, resumed=False):
    return open_splits(load_config(None, [*SETTINGS, *words]), tmp_path / "run", resumed)


def drawn(planner, steps=200):
    rows = np.concatenate([planner.plan(step).rows for step in range(steps)])
    return set(planner.manifests.sequence_of(rows).tolist())


def test_only_names_decide_what_is_held_out():
    for count, share, held in ((20, 0.2, 4), (20, 0.01, 1), (2, 0.1, 1), (1, 0.5, 0), (9, 0, 0)):
        found = held_out([f"s{i}" for i in range(count)], share)
        assert len(found) == held
        assert sorted(set(found.tolist()) & set(range(count))) == found.tolist()
    names = [f"s{i}" for i in range(50)]
    chosen = {names[i] for i in held_out(names, 0.3)}
    assert {names[::-1][i] for i in held_out(names[::-1], 0.3)} == chosen
    assert chosen != set(names[:15])
    assert {names[i] for i in held_out(names, 0.1)} < chosen
    fewer = names[:30]
    assert {fewer[i] for i in held_out(fewer, 0.5)} >= chosen & set(fewer), "both hold 15 out"


def test_what_is_held_out_is_evaluated_and_never_trained_on(image_folder, tmp_path):
    found = sources(tmp_path, f"data.root={image_folder}", "data.held_out=0.5")
    assert len(found.shown) == 2
    assert drawn(found.held_out) == set(found.shown.tolist()) == set(np.flatnonzero(found.is_held_out).tolist())
    assert drawn(found.training) == set(range(4)) - set(found.shown.tolist())


def test_runs_of_other_seeds_are_evaluated_on_the_same_batches(image_folder, tmp_path):
    plans = [sources(tmp_path, f"data.root={image_folder}", f"run.seed={seed}") for seed in (0, 1)]
    assert np.array_equal(plans[0].held_out.plan(3).rows, plans[1].held_out.plan(3).rows)
    assert not np.array_equal(plans[0].training.plan(3).rows, plans[1].training.plan(3).rows)


def test_single_images_are_not_held_out(image_folder, tmp_path):
    words = [f"data.root={image_folder}", f"data.image_root={image_folder}", "data.imagenet_share=0.5"]
    found = sources(tmp_path, *words)
    assert found.manifests.datasets == ("folder", "images")
    assert found.manifests.num_sequences == 4 + 24
    assert found.shown.tolist() == [2]
    assert drawn(found.held_out) == {2}
    assert drawn(found.training) == set(range(28)) - {2}


def test_a_data_set_of_weight_zero_is_neither_trained_on_nor_held_out(image_folder, tmp_path):
    build("folder", image_folder, tmp_path / "a.arrow", dataset="a")
    words = [f"data.manifests=[{tmp_path}/a.arrow]", f"data.root={image_folder}", "data.weights={a: 0}"]
    found = sources(tmp_path, *words)
    assert found.manifests.datasets == ("a", "folder")
    assert drawn(found.training) | drawn(found.held_out) == {4, 5, 6, 7}


def test_a_resumed_run_keeps_its_manifest_unless_it_is_of_another_folder(image_folder, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    sources(tmp_path, "data.root=../images")
    shutil.copytree(image_folder, tmp_path / "more")
    shutil.copytree(image_folder / "scene0", image_folder / "scene7")
    assert sources(tmp_path, "data.root=../images", resumed=True).manifests.num_sequences == 4
    assert sources(tmp_path, "data.root=../images").manifests.num_sequences == 5
    (tmp_path / "run/manifests/folder.arrow").write_bytes(b"cut short")
    assert sources(tmp_path, "data.root=../images", resumed=True).manifests.num_sequences == 5
    assert sources(tmp_path, "data.root=../more", resumed=True).manifests.file(0).is_relative_to(tmp_path / "more")


def test_embedded_scenes_become_a_manifest_of_as_many_as_asked_for(tmp_path, monkeypatch):
    def ensure_scenes(count, views, size, seed):
        for i in range(count + 2):
            for j in range(views):
                (tmp_path / f"cache/scene_{i:04d}").mkdir(parents=True, exist_ok=True)
                (tmp_path / f"cache/scene_{i:04d}/{j:03d}.png").touch()
            frames = [{"file": f"{j:03d}.png", "depth": "", "K": np.eye(3).tolist(), "T_cam_world": np.eye(4).tolist()}
                      for j in range(views)]  # fmt: skip
            cameras = json.dumps({"depth_unit": 1, "frames": frames})
            (tmp_path / f"cache/scene_{i:04d}/cameras.json").write_text(cameras)
        return tmp_path / "cache"

    monkeypatch.setattr("fastmum.scenes.ensure_scenes", ensure_scenes)
    found = sources(tmp_path, "data.scenes={count: 3, views: 4}")
    assert found.manifests.datasets == ("scenes",)
    assert (found.manifests.num_sequences, found.manifests.num_frames) == (3, 12)
    assert found.manifests.file(11) == tmp_path / "cache/scene_0002/003.png"


def test_held_out_sequences_that_cannot_fill_a_batch_are_evaluated_as_in_the_paper(tmp_path, caplog):
    """24 frames are 5 + 5 + 7 + 7, but no number of sequences of 5."""
    records = [SequenceRecord(f"s{i}", [f"{i}/{j}.jpg" for j in range(7)]) for i in range(20)]
    (held,) = held_out([record.name for record in records], 0.01)
    records[held] = records[held]._replace(frames=records[held].frames[:5])
    write_manifest(tmp_path / "m.arrow", records, dataset="d", root=tmp_path, metadata={})
    words = ["data.views=[5,7]", "data.frames_per_batch=24", "data.held_out=0.01", "data.imagenet_share=0"]
    found = sources(tmp_path, f"data.manifests=[{tmp_path}/m.arrow]", *words)
    assert found.training.mode == "packed"
    assert found.held_out.plan(0).lengths.tolist() == [5] * 4
    assert "evaluated as with data.mode=paper" in caplog.text


def test_nothing_held_out_is_said(image_folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        found = sources(tmp_path, f"data.root={image_folder}", "data.held_out=0")
    assert found.held_out is None
    assert len(found.shown) == 4
    assert "no sequence is held out" in caplog.text
    assert "training on 4 sequences (24 frames), held out: 0 (0 frames)" in caplog.text


def test_what_cannot_be_opened_is_one_line(image_folder, tmp_path):
    for words, message in (
        (["data.root=nowhere"], "data.root is 'nowhere'"),
        (["data.manifests=[nowhere.arrow]"], "'nowhere.arrow'"),
        (["data.weights={sclaes: 1}"], "'sclaes'"),
        (["data.views=[7,8]", "data.frames_per_batch=8"], "7 images (data.views[0])"),
    ):
        with pytest.raises(DataError) as caught:
            sources(tmp_path, *([] if "root" in words[0] else [f"data.root={image_folder}"]), *words)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

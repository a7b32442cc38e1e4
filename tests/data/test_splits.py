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


@pytest.fixture
def sources(image_folder, tmp_path, monkeypatch):
    """Opens the splits of a run that starts next to the folder of images."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def sources(*words, data="data.root=../images", resumed=False):
        return open_splits(load_config(None, [*SETTINGS, data, *words]), tmp_path / "run", resumed)

    return sources


def drawn(planner):
    rows = np.concatenate([planner.plan(step).rows for step in range(200)])
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


def test_what_is_held_out_is_evaluated_and_never_trained_on(sources):
    found, other = (sources("data.held_out=0.5", f"run.seed={seed}") for seed in (0, 1))
    assert len(found.shown) == 2
    assert drawn(found.held_out) == set(found.shown.tolist()) == set(np.flatnonzero(found.is_held_out).tolist())
    assert drawn(found.training) == set(range(4)) - set(found.shown.tolist())
    assert np.array_equal(found.held_out.plan(3).rows, other.held_out.plan(3).rows), "whatever the run's seed"
    assert not np.array_equal(found.training.plan(3).rows, other.training.plan(3).rows)


def test_neither_single_images_nor_data_sets_of_weight_zero_are_held_out(sources, image_folder, tmp_path):
    build("folder", image_folder, tmp_path / "a.arrow", dataset="a")
    words = ["data.manifests=[../a.arrow]", "data.weights={a: 0}", "data.imagenet_share=0.5"]
    found = sources("data.image_root=../images", *words)
    assert found.manifests.datasets == ("a", "folder", "images")
    assert found.manifests.num_sequences == 4 + 4 + 24
    assert set(found.shown.tolist()) == drawn(found.held_out) == {6}
    assert drawn(found.training) == set(range(4, 32)) - {6}


def test_a_resumed_run_keeps_its_manifest_unless_it_is_of_another_folder(sources, image_folder, tmp_path):
    sources()
    shutil.copytree(image_folder, tmp_path / "more")
    shutil.copytree(image_folder / "scene0", image_folder / "scene7")
    assert sources(resumed=True).manifests.num_sequences == 4
    assert sources().manifests.num_sequences == 5
    (tmp_path / "run/manifests/folder.arrow").write_bytes(b"cut short")
    assert sources(resumed=True).manifests.num_sequences == 5
    assert sources(data="data.root=../more", resumed=True).manifests.file(0).is_relative_to(tmp_path / "more")


def test_embedded_scenes_become_a_manifest_of_as_many_as_asked_for(sources, tmp_path, monkeypatch):
    def ensure_scenes(count, views, size, seed):
        names = [f"{j:03d}.png" for j in range(views)]
        camera = {"depth": "", "K": np.eye(3).tolist(), "T_cam_world": np.eye(4).tolist()}
        cameras = json.dumps({"depth_unit": 1, "frames": [{"file": name} | camera for name in names]})
        for i in range(count + 2):
            (tmp_path / f"cache/scene_{i:04d}").mkdir(parents=True)
            (tmp_path / f"cache/scene_{i:04d}/cameras.json").write_text(cameras)
        return tmp_path / "cache"

    monkeypatch.setattr("fastmum.scenes.ensure_scenes", ensure_scenes)
    found = sources(data="data.scenes={count: 3, views: 4}")
    assert found.manifests.datasets == ("scenes",)
    assert (found.manifests.num_sequences, found.manifests.num_frames) == (3, 12)
    assert found.manifests.file(11) == tmp_path / "cache/scene_0002/003.png"


def test_held_out_sequences_that_cannot_fill_a_batch_are_evaluated_as_in_the_paper(sources, tmp_path, caplog):
    """24 frames are 5 + 5 + 7 + 7, but no number of sequences of 5."""
    records = [SequenceRecord(f"s{i}", [f"{i}/{j}.jpg" for j in range(7)]) for i in range(20)]
    (held,) = held_out([record.name for record in records], 0.01)
    records[held] = records[held]._replace(frames=records[held].frames[:5])
    write_manifest(tmp_path / "m.arrow", records, dataset="d", root=tmp_path, metadata={})
    words = ["data.views=[5,7]", "data.frames_per_batch=24", "data.held_out=0.01", "data.imagenet_share=0"]
    found = sources(*words, data="data.manifests=[../m.arrow]")
    assert found.training.mode == "packed"
    assert found.held_out.plan(0).lengths.tolist() == [5] * 4
    assert "evaluated as with data.mode=paper" in caplog.text


def test_nothing_held_out_is_said(sources, caplog):
    with caplog.at_level(logging.INFO):
        found = sources("data.held_out=0")
    assert found.held_out is None
    assert len(found.shown) == 4
    assert "no sequence is held out" in caplog.text
    assert "training on 4 sequences (24 frames), held out: 0 (0 frames)" in caplog.text


def test_what_cannot_be_opened_is_one_line(sources):
    for words, message in (
        (["data.root=nowhere"], "data.root is 'nowhere'"),
        (["data.manifests=[nowhere.arrow]"], "'nowhere.arrow'"),
        (["data.weights={sclaes: 1}"], "'sclaes'"),
        (["data.views=[7,8]", "data.frames_per_batch=8"], r"7 images \(data\.views\[0\]\)"),
    ):
        with pytest.raises(DataError, match=rf"^[^\n]*{message}[^\n]*$"):
            sources(*words)

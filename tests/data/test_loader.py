"""Data of a run: splits; batches in order, no leftover threads; bad frames replaced; files retried; late batches."""

import json
import logging
import os
import shutil
import threading
import time
import weakref
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from processes import wait_for

from fastmum.config import load_config
from fastmum.data.build import build
from fastmum.data.decode import make_decoder
from fastmum.data.decode.image import draw_crops, read_file, whole_frames
from fastmum.data.errors import DataError
from fastmum.data.loader import Batch, Loader, _InUse
from fastmum.data.manifest import Manifests, SequenceRecord, write_manifest
from fastmum.data.plan import StepPlan, StepPlanner
from fastmum.data.splits import held_out, open_splits
from fastmum.errors import StoppedError

SIZE = 32
DECODER = make_decoder("pillow", SIZE)


@pytest.fixture
def manifests(image_folder):
    """The folder's four scenes of six frames each, as one data set."""
    build("folder", image_folder, image_folder / "scenes.arrow", dataset="scenes")
    return Manifests([image_folder / "scenes.arrow"])


def plan_of(rows, lengths, seed=0):
    rng = np.random.default_rng(seed)
    crops = draw_crops(rng, len(rows), (0.2, 1.0), (3 / 4, 4 / 3))
    return StepPlan(np.array(rows), np.array(lengths), crops, rng.random(len(rows)) < 0.5)


def whole(rows):
    return StepPlan(np.array(rows), np.array([len(rows)]), whole_frames(len(rows)), np.zeros(len(rows), bool))


def decode_threads():
    return [t for t in threading.enumerate() if t.name.startswith("decode")]


@pytest.mark.parametrize("name", ["pillow", "dali"])
def test_batches_come_in_order_and_bad_frames_are_replaced(manifests, tmp_path, name):
    plans = [plan_of(np.random.default_rng(step).permutation(24)[:5], [3, 2], step) for step in range(9)]
    decoder = DECODER
    if name == "dali":  # the GPU's graph and its shared pipelines, on the CPU
        dali = pytest.importorskip("fastmum.data.decode.dali", reason="DALI is not installed")
        decoder = dali.DaliGpuDecoder(SIZE, torch.device("cpu"))
    loader = Loader(decoder, manifests, 3, bad_frames=tmp_path / "bad_frames.log")
    manifests.file(8).write_text("not an image")
    for plan, batch in zip(plans, loader.batches(plans), strict=True):
        assert batch.lengths == (3, 2)
        assert batch.frames.shape == (5, SIZE, SIZE, 3)
        assert batch.frames.is_contiguous()
        assert torch.equal(batch.frames, loader.load(plan).frames)
    assert not decode_threads()
    plan = plan_of([7, 8, 9, 0, 1], [3, 2])
    expected = loader.load(plan._replace(rows=np.array([7, 10, 9, 0, 1]))).frames
    assert torch.equal(loader.load(plan).frames, expected), "the next that the batch has not, same crop and flip"
    assert loader.faults.counts == {"scenes": 1}
    listed = [line.split("\t")[1] for line in (tmp_path / "bad_frames.log").read_text().splitlines()]
    assert listed == [str(manifests.file(8))]


def test_decoding_threads_have_no_openmp_threads_of_their_own(manifests, monkeypatch):
    counts, loader, before = [], Loader(DECODER, manifests, workers=2), torch.get_num_threads()
    load = loader.load
    torch.set_num_threads(2)
    monkeypatch.setattr(loader, "load", lambda plan: counts.append(torch.get_num_threads()) or load(plan))
    assert len(list(loader.batches([plan_of([0], [1])] * 5))) == len(counts) == 5
    torch.set_num_threads(before)
    assert set(counts) == {1}, "with more threads than cores OpenMP's wait passively, and a step takes twice the time"


def test_few_batches_are_decoded_ahead_and_waiting_is_counted(manifests):
    loader, plans = Loader(DECODER, manifests, workers=2), iter([plan_of([0, 1, 2, 3], [4])] * 50)
    batches = loader.batches(plans)
    next(batches)
    assert len(list(plans)) == 47, "the one returned and two ahead"
    assert loader.wait_seconds > 0
    batches.close()
    assert not decode_threads()


@pytest.mark.parametrize(
    ("broken", "held", "wanted", "replaced"),
    [
        ((1, 2, 3), None, (0, 1, 2), (0, 4, 5)),  # different neighbours
        (range(6, 12), [False, False, True, False], (6, 7, 8), (0, 1, 2)),  # another sequence that is not held out
        ((6, 7, 8, 10, 11), None, (9, 6, 11), (9, 9, 9)),  # the last readable frame of a sequence
        (range(18), None, (0, 9, 23), (18, 21, 23)),  # the last readable sequence
    ],
)
def test_which_frames_replace_broken_ones(manifests, broken, held, wanted, replaced):
    intact = Loader(DECODER, manifests, 1).load(whole(range(24))).frames
    for row in broken:
        manifests.file(row).unlink()
    loader = Loader(DECODER, manifests, 1, held_out=held and np.array(held))
    assert torch.equal(loader.load(whole(wanted)).frames, intact[list(replaced)])
    assert loader.faults.counts == {"scenes": len({*broken} & {*wanted})}, "only frames of batches count"


def test_a_data_set_without_a_readable_frame_stops_and_is_named(manifests):
    for row in (3, 4):
        manifests.file(row).unlink()
    with pytest.raises(DataError, match=r"8\.3% of the frames of the data set 'scenes'"):
        list(Loader(DECODER, manifests, 1).batches([whole(range(20)), whole(range(20, 24))]))  # even in a good batch
    for row in range(24):
        manifests.file(row).write_bytes(b"")
    with pytest.raises(DataError, match=r"scene\d/\d.png' .*'scenes'"):
        list(Loader(DECODER, manifests, 2).batches([plan_of([0, 6], [1, 1])] * 9))
    assert not decode_threads()


def test_a_file_that_comes_back_in_time_is_not_bad(manifests, monkeypatch):
    """An empty file, and a file of a sequence with a bad frame, are not waited for."""
    loader = Loader(DECODER, manifests, 1, retry_s=60)
    intact = loader.load(whole(range(6))).frames
    gone, away = manifests.file(2), manifests.file(2).with_name("away")
    gone.rename(away)
    looked = []
    monkeypatch.setattr(loader._closing, "wait", lambda s: len(looked) == 3 and not away.rename(gone))
    monkeypatch.setattr("fastmum.data.loader.read_file", lambda file: looked.append(file) or read_file(file))
    assert torch.equal(loader.load(whole(range(6))).frames, intact)
    assert looked == [gone] * 4
    assert loader.faults.counts == {}
    manifests.file(8).write_bytes(b"")
    manifests.file(9).unlink()
    loader.retry_s = 0.01
    monkeypatch.setattr(loader._closing, "wait", lambda s: time.sleep(0.02))
    loader.load(whole(range(8, 10)))
    assert looked[4:] == [manifests.file(row) for row in (8, 9, 9)]
    manifests.file(10).unlink()
    loader.load(whole(range(6, 12)))
    assert len(looked) == 7
    assert loader.faults.counts == {"scenes": 3}


def test_a_late_batch_names_the_file_and_ends_with_a_stop_signal(manifests, monkeypatch, caplog):
    """Neither the read that never returns nor a file that is retried holds it up."""
    end = threading.Event()
    monkeypatch.setattr("fastmum.data.loader.GRACE_S", 0.05)
    monkeypatch.setattr("fastmum.data.loader.POLL_S", 0.01)
    monkeypatch.setattr("fastmum.data.loader.WARN_S", 0.05)
    regular = "fastmum.data.decode.image.regular"
    monkeypatch.setattr(regular, lambda file: file if file.parent.name != "scene1" or end.wait(60) else None)
    batches = Loader(DECODER, manifests, 2).batches([whole([0]), whole([6]), whole([12])], lambda: bool(caplog.text))
    with pytest.raises(StoppedError, match=r"scene1/0\.png"):
        list(batches)
    assert "scene1/0.png" in caplog.text
    end.set()
    monkeypatch.undo()
    manifests.file(3).unlink()
    with pytest.raises(StoppedError):
        list(Loader(DECODER, manifests, 1, retry_s=60).batches([whole([3])], lambda: True))
    wait_for(lambda: not decode_threads(), "the end of the threads")


def test_the_memory_of_a_gpu_batch_is_kept_until_the_work_on_it_is_done(monkeypatch):
    events = [Mock(**{"query.return_value": False}) for _ in range(4)]
    monkeypatch.setattr(torch.cuda, "Event", Mock(side_effect=events))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")

    class Frames:
        is_cuda, device = True, "cuda:0"

    in_use, alive = _InUse(), []
    for step in range(4):
        events[0].query.return_value = step == 3
        frames = Frames()
        alive.append(weakref.ref(frames))
        in_use.add(Batch(frames, ()))
        del frames
        assert [ref() is not None for ref in alive] == [step < 3, True, True, True][: step + 1]
    in_use.wait()
    assert not any(ref() for ref in alive)
    for event in events[1:]:
        event.record.assert_called_once_with("the stream")
        event.synchronize.assert_called_once()


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


def test_what_is_held_out_is_evaluated_and_never_trained_on(sources, caplog):
    found, other = (sources("data.held_out=0.5", f"run.seed={seed}") for seed in (0, 1))
    assert len(found.shown) == 2
    assert drawn(found.held_out) == set(found.shown.tolist()) == set(np.flatnonzero(found.is_held_out).tolist())
    assert drawn(found.training) == set(range(4)) - set(found.shown.tolist())
    assert np.array_equal(found.held_out.plan(3).rows, other.held_out.plan(3).rows), "whatever the run's seed"
    assert not np.array_equal(found.training.plan(3).rows, other.training.plan(3).rows)
    with caplog.at_level(logging.INFO):
        none = sources("data.held_out=0")
    assert none.held_out is None
    assert len(none.shown) == 4
    assert "no sequence is held out" in caplog.text
    assert "training on 4 sequences (24 frames), held out: 0 (0 frames)" in caplog.text


def test_neither_single_images_nor_data_sets_of_weight_zero_are_held_out(sources, image_folder, tmp_path):
    build("folder", image_folder, tmp_path / "a.arrow", dataset="a")
    shutil.copytree(image_folder, tmp_path / "singles")
    words = ["data.manifests=[../a.arrow]", "data.weights={a: 0}", "data.imagenet_share=0.5"]
    found = sources("data.image_root=../singles", *words)
    assert found.manifests.datasets == ("a", "folder", "images")
    assert found.manifests.num_sequences == 4 + 4 + 24
    assert set(found.shown.tolist()) == drawn(found.held_out) == {6}
    assert drawn(found.training) == set(range(4, 32)) - {6}


def test_sequences_of_one_scene_are_held_out_together(tmp_path, sources, caplog):
    """Also those that are too short to be drawn."""
    videos = [SequenceRecord(f"v{i}", [f"v{i}/{j}.jpg" for j in range(13)]) for i in range(10)]
    chunks = [video.select(range(j, min(j + 6, 13)), f"{video.name}/{j}") for video in videos for j in (0, 6, 12)]
    for name, records in (("m", chunks), ("one", chunks[:3])):
        write_manifest(tmp_path / name, records, dataset="d", root=tmp_path, metadata={})
    found = sources("data.imagenet_share=0", data="data.manifests=[../m]")
    scenes = [record.name[:2] for record in chunks]
    chosen = {scenes[i] for i in np.flatnonzero(found.is_held_out)}
    assert found.is_held_out.tolist() == [scene in chosen for scene in scenes]
    assert chosen == {f"v{i}" for i in held_out([video.name for video in videos], 0.3)}
    assert len(found.shown) == 2 * len(chosen) == 6
    assert drawn(found.held_out) == set(found.shown.tolist())
    assert drawn(found.training) == {i for i, scene in enumerate(scenes) if scene not in chosen and i % 3 < 2}
    assert sources(data="data.manifests=[../one]").held_out is None
    assert "one scene" in caplog.text


def test_images_that_are_held_out_and_trained_on_are_refused(sources, image_folder, tmp_path):
    """Under one path, through links to files and folders, and as hard links."""
    copies = tmp_path / "copies"
    for scene in image_folder.iterdir():
        for kind, link in (("soft", os.symlink), ("hard", os.link)):
            (copies / kind / f"{scene.name}_{kind}").mkdir(parents=True)
            for file in scene.iterdir():
                link(file, copies / kind / f"{scene.name}_{kind}" / file.name)
    (tmp_path / "other").symlink_to(image_folder)
    (tmp_path / "folders").mkdir()
    for scene in image_folder.iterdir():
        (tmp_path / "folders" / scene.name).symlink_to(scene)
    for words in (
        ["data.image_root=../images"],
        *(["data.image_root=" + str(path)] for path in (tmp_path / "other", tmp_path / "folders")),
        *(["data.image_root=" + str(copies / kind)] for kind in ("soft", "hard")),
    ):
        with pytest.raises(DataError, match=r"^6 of 6 held-out images are also trained on, such as '[^\n]*png'[^\n]*$"):
            sources("data.imagenet_share=0.5", "data.held_out=0.1", *words)
        assert sources("data.imagenet_share=0.5", "data.held_out=0", *words).held_out is None


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
    again = StepPlanner([tmp_path / "m.arrow"], None, 24, (5, 7), 0.0, exclude=[held])
    assert np.array_equal(again.plan(1).rows, found.training.plan(1).rows)


def test_what_cannot_be_opened_is_one_line(sources):
    for words, message in (
        (["data.root=nowhere"], "data.root is 'nowhere'"),
        (["data.manifests=[nowhere.arrow]"], "'nowhere.arrow'"),
        (["data.weights={sclaes: 1}"], "'sclaes'"),
        (["data.views=[7,8]", "data.frames_per_batch=8"], r"7 images \(data\.views\[0\]\)"),
    ):
        with pytest.raises(DataError, match=rf"^[^\n]*{message}[^\n]*$"):
            sources(*words)

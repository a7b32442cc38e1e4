"""Data of a run: splits; batches in order, no leftover threads; bad frames counted, listed, replaced, or a stop."""

import json
import logging
import os
import shutil
import threading
import weakref
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fastmum.config import load_config
from fastmum.data.build import build
from fastmum.data.decode import make_decoder
from fastmum.data.decode.image import draw_crops, whole_frames
from fastmum.data.errors import DataError
from fastmum.data.loader import MIN_FRAMES, Batch, Faults, Loader, _InUse
from fastmum.data.manifest import Manifests, SequenceRecord, write_manifest
from fastmum.data.plan import StepPlan, StepPlanner
from fastmum.data.splits import held_out, open_splits

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


def test_batches_come_in_order_and_bad_frames_are_replaced(manifests, tmp_path):
    plans = [plan_of(np.random.default_rng(step).permutation(24)[:5], [3, 2], step) for step in range(9)]
    loader = Loader(DECODER, manifests, 3, bad_frames=tmp_path / "bad_frames.log")
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
        (range(6, 12), [False, False, True, False], (6, 7, 8), (18, 19, 20)),  # the next that is not held out
        ((6, 7, 8, 10, 11), None, (9, 6, 11), (9, 9, 9)),  # the last readable frame of a sequence
    ],
)
def test_which_frames_replace_broken_ones(manifests, broken, held, wanted, replaced):
    intact = Loader(DECODER, manifests, 1).load(whole(range(24))).frames
    for row in broken:
        manifests.file(row).unlink()
    loader = Loader(DECODER, manifests, 1, held_out=held and np.array(held))
    assert torch.equal(loader.load(whole(wanted)).frames, intact[list(replaced)])
    assert loader.faults.counts == {"scenes": len(broken)}, "those met while looking for a replacement count"


def test_a_data_set_without_a_readable_frame_stops_and_is_named(manifests):
    for row in (3, 4):
        manifests.file(row).unlink()
    with pytest.raises(DataError, match="2 of 24 frames of the data set 'scenes'"):
        list(Loader(DECODER, manifests, 1).batches([whole(range(20)), whole(range(20, 24))]))  # even in a good batch
    for row in range(24):
        manifests.file(row).write_bytes(b"")
    with pytest.raises(DataError, match=r"'scenes'|scene\d/\d.png"):
        list(Loader(DECODER, manifests, 2).batches([plan_of([0, 6], [1, 1])] * 9))
    assert not decode_threads()


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


@pytest.fixture
def manifests_of(tmp_path):
    """Manifests with a data set for each keyword, whose sequences have the lengths given."""

    def of(**datasets):
        for name, lengths in datasets.items():
            frames = [[f"{name}/s{i}/{j}.jpg" for j in range(n)] for i, n in enumerate(lengths)]
            records = [SequenceRecord(f"s{i}", files) for i, files in enumerate(frames)]
            write_manifest(tmp_path / f"{name}.arrow", records, dataset=name, root=tmp_path, metadata={})
        return Manifests([tmp_path / f"{name}.arrow" for name in datasets])

    return of


def report(faults, read, bad=(), reason="truncated"):
    """Frames that were read, and those of them that are bad."""
    faults.read(np.array(read))
    for row in bad:
        faults.add(row, faults.manifests.file(row), reason)
    faults.check()


def test_frames_are_counted_once_and_the_first_are_logged(manifests_of, caplog):
    faults = Faults(manifests_of(a=[1000], b=[100]))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            report(faults, range(1100), [*range(20), 1050])
    assert faults.counts == {"a": 20, "b": 1}
    assert caplog.text.count("cannot be decoded") == 3 + 1


def test_every_bad_frame_is_listed_once_over_runs_and_processes(manifests_of, tmp_path):
    manifests, log = manifests_of(a=[500], b=[500], c=[500]), tmp_path / "run" / "bad_frames.log"
    first, other = Faults(manifests, log), Faults(manifests, log)
    assert not log.exists(), "no file before there is a bad frame"
    report(first, range(1500), [1, 700])
    report(other, range(1500), [1, 2])
    report(first, [2], [2], "two\nlines")
    with open(log, "a") as lines:
        lines.write("a set of another run\t/images/0.jpg\tempty\n")
    later = Faults(manifests, log)
    assert later.counts == first.counts == other.counts == {"a": 2, "b": 1}
    report(later, range(1500), [700, 3, 1200], "two\nlines")
    rows = [(1, "truncated"), (700, "truncated"), (2, "truncated"), (3, "two lines"), (1200, "two lines")]
    lines = [line.split("\t") for line in log.read_text().splitlines() if "another run" not in line]
    assert lines == [[manifests.datasets[row // 500], str(manifests.file(row)), why] for row, why in rows]
    assert Faults(manifests, log).counts == first.counts == {"a": 3, "b": 1, "c": 1}
    # Frames found before a resume do not count towards the limit.
    before, resumed = (Faults(manifests, tmp_path / "bad_frames.log") for _ in range(2))
    report(before, range(500), range(25))
    report(resumed, range(20, 50), [20])
    assert resumed.counts == {"a": 25}
    # A file of two data sets is bad in both.
    record = SequenceRecord("s", ["0.jpg"])
    write_manifest(tmp_path / "m", [record, record._replace(dataset="b")], dataset="a", root=tmp_path, metadata={})
    faults = Faults(Manifests([tmp_path / "m"]), tmp_path / "two.log")
    report(faults, [0, 1], [0, 1])
    assert faults.counts == Faults(faults.manifests, tmp_path / "two.log").counts == {"a": 1, "b": 1}


def test_a_log_that_cannot_be_read_or_written_is_named(manifests_of, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a\t0.jpg\tempty\n")
    faults = Faults(manifests_of(a=[100]), tmp_path / "file" / "bad_frames.log")
    with pytest.raises(DataError, match=r"bad_frames.log' cannot be written"):
        report(faults, range(100), [0])
    monkeypatch.setattr("builtins.open", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(DataError, match=r"file' cannot be read \(Permission denied\)"):
        Faults(faults.manifests, tmp_path / "file")


def test_where_the_limit_is(manifests_of, tmp_path):
    for length, read, limit in (
        (MIN_FRAMES - 1, MIN_FRAMES - 1, None),  # too few
        (MIN_FRAMES, MIN_FRAMES, 2),  # all were read: 5 % exactly
        (1000, 1000, 51),
        (10**5, 100, 12),  # few of many were read: 5 % and three standard errors
        (10**5, 5_000, 296),
    ):
        faults = Faults(manifests_of(a=[length], b=[100]), tmp_path / "bad_frames.log")
        report(faults, range(read), range(read if limit is None else limit - 1))
        if limit is not None:
            named = ", ".join(f"'{tmp_path}/a/s0/{i}.jpg'" for i in range(min(limit, 3)))
            with pytest.raises(DataError, match=rf"^{limit} of {read} .*'a' .*as {named};.*bad_frames\.log'"):
                report(faults, [limit - 1], [limit - 1])
    # 11 of 180 may be chance while 20 are unread; 11 of 200 are more than 5 %.
    faults = Faults(manifests_of(a=[200], b=[200]))
    report(faults, range(180), range(11))
    report(faults, range(200, 400))
    with pytest.raises(DataError, match="11 of 200 frames of the data set 'a'"):
        report(faults, range(180, 200))


def test_replacements_are_neighbours_of_the_same_split_that_the_batch_does_not_have(manifests_of):
    faults = Faults(manifests_of(a=[3, 6, 2], b=[4]))
    order = list(faults.replacements(5, taken={5, 6, 8}))
    assert order[:5] == [7, 3, 4, 6, 8], "sequence 3..8 from 5 on, those in the batch last"
    assert set(order[5:]) == {0, 1, 2, 9, 10}, "then the other sequences of the data set"
    report(faults, [7], [7])
    assert list(faults.replacements(5, taken={5, 6, 8}))[:2] == [3, 4]
    faults = Faults(manifests_of(a=[5], imagenet=[1] * 50))
    assert list(faults.replacements(20, taken={20})) == [21, 22, 23], "the next single images"
    assert list(faults.replacements(54, taken={54})) == [5, 6, 7], "the first follow the last"
    held = np.array([False, True, False, True, False, True, True])
    faults = Faults(manifests_of(a=[2] * 5, imagenet=[1, 1]), held_out=held)
    assert list(faults.replacements(0, {0})) == [1, 4, 5, 8, 9]
    assert list(faults.replacements(3, {2, 3})) == [2, 7, 6], "a duplicate in the sequence before another sequence"
    assert list(faults.replacements(8, {8})) == [9, 0, 1, 4, 5]
    assert list(faults.replacements(10, {10})) == [11]


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

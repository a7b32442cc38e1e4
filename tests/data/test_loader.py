"""Batches: order, waiting, bad frames, and no leftover threads."""

import threading
import weakref
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fastmum.data.decode import make_decoder
from fastmum.data.decode.image import draw_crops, whole_frames
from fastmum.data.errors import DataError
from fastmum.data.loader import Batch, Loader, _InUse
from fastmum.data.manifest import Manifests, SequenceRecord, write_manifest
from fastmum.data.plan import StepPlan

SIZE = 32


@pytest.fixture
def manifests(image_folder) -> Manifests:
    """The folder's four scenes of six frames each, as one data set."""
    scenes = sorted(image_folder.iterdir())
    records = [SequenceRecord(s.name, [f"{s.name}/{f.name}" for f in sorted(s.iterdir())]) for s in scenes]
    write_manifest(image_folder / "scenes.arrow", records, dataset="scenes", root=image_folder, metadata={})
    return Manifests([image_folder / "scenes.arrow"])


@pytest.fixture
def decoder():
    return make_decoder("pillow", SIZE)


def plan_of(rows, lengths, seed=0) -> StepPlan:
    rng = np.random.default_rng(seed)
    crops = draw_crops(rng, len(rows), (0.2, 1.0), (3 / 4, 4 / 3))
    return StepPlan(np.array(rows), np.array(lengths), crops, rng.random(len(rows)) < 0.5)


def whole(rows) -> StepPlan:
    return StepPlan(np.array(rows), np.array([len(rows)]), whole_frames(len(rows)), np.zeros(len(rows), bool))


def decode_threads():
    return [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_batches_come_in_order_and_bad_frames_are_replaced(manifests, decoder, tmp_path):
    plans = [plan_of(np.random.default_rng(step).permutation(24)[:5], [3, 2], step) for step in range(9)]
    loader = Loader(decoder, manifests, 3, bad_frames=tmp_path / "bad_frames.log")
    manifests.file(8).write_text("not an image")
    batches = list(loader.batches(plans))
    assert len(batches) == 9
    for plan, batch in zip(plans, batches, strict=True):
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


def test_few_batches_are_decoded_ahead_and_waiting_is_counted(manifests, decoder):
    asked = []

    def plans():
        for step in range(50):
            asked.append(step)
            yield plan_of([0, 1, 2, 3], [4], step)

    loader = Loader(decoder, manifests, workers=2)
    batches = loader.batches(plans())
    next(batches)
    assert len(asked) == 3, "the one returned and two ahead"
    assert loader.wait_seconds > 0
    batches.close()
    assert not decode_threads(), "no thread is left"


@pytest.mark.parametrize(
    ("broken", "held_out", "wanted", "replaced"),
    [
        ((1, 2, 3), None, (0, 1, 2), (0, 4, 5)),  # different neighbours
        (range(6, 12), [False, False, True, False], (6, 7, 8), (18, 19, 20)),  # the next that is not held out
        ((6, 7, 8, 10, 11), None, (9, 6, 11), (9, 9, 9)),  # the last readable frame of a sequence
    ],
)
def test_which_frames_replace_broken_ones(manifests, decoder, broken, held_out, wanted, replaced):
    loader = Loader(decoder, manifests, 1, held_out=None if held_out is None else np.array(held_out))
    intact = [loader.load(whole([row])).frames[0] for row in range(24)]
    for row in broken:
        manifests.file(row).unlink()
    fresh = Loader(decoder, manifests, 1, held_out=loader.faults.held_out)
    for frame, row in zip(fresh.load(whole(wanted)).frames, replaced, strict=True):
        assert torch.equal(frame, intact[row])
    assert fresh.faults.counts == {"scenes": len(broken)}, "those met while looking for a replacement count"


def test_a_data_set_without_a_readable_frame_stops_and_is_named(manifests, decoder):
    for row in (3, 4):
        manifests.file(row).unlink()
    loader = Loader(decoder, manifests, workers=1)
    with pytest.raises(DataError, match="2 of 24 frames of the data set 'scenes'"):
        list(loader.batches([whole(range(20)), whole(range(20, 24))]))  # even in a good batch
    for row in range(24):
        manifests.file(row).write_bytes(b"")
    loader = Loader(decoder, manifests, workers=2)
    with pytest.raises(DataError, match=r"'scenes'|scene\d/\d.png"):
        list(loader.batches([plan_of([0, 6], [1, 1])] * 9))
    assert not decode_threads()


def test_the_memory_of_a_gpu_batch_is_kept_until_the_work_on_it_is_done(monkeypatch):
    events = [Mock(**{"query.return_value": False}) for _ in range(4)]
    monkeypatch.setattr(torch.cuda, "Event", Mock(side_effect=events))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")

    class Frames:
        is_cuda, device = True, "cuda:0"

    in_use, alive = _InUse(), []
    for _ in range(3):
        frames = Frames()
        alive.append(weakref.ref(frames))
        in_use.add(Batch(frames, ()))
    del frames
    assert all(ref() is not None for ref in alive)
    events[0].query.return_value = True
    in_use.add(Batch(Frames(), ()))
    assert [ref() is not None for ref in alive] == [False, True, True]
    in_use.wait()
    assert not any(ref() for ref in alive)
    for event in events[1:]:
        event.record.assert_called_once_with("the stream")
        event.synchronize.assert_called_once()

"""Checkpoints written and read by one process."""

import os
import shutil
import threading

import pytest
import torch
from states import CONFIG, VALUES, assert_newest, assert_same, full_state

from fastmum.engine.checkpoint import (
    CheckpointError,
    Checkpoints,
    find_checkpoints,
    load_checkpoint,
    load_newest,
    read_weights,
    set_aside_after,
)
from fastmum.engine.checkpoint.writer import Snapshot


def write(folder, *steps, keep=10, **kwargs):
    """Checkpoints whose state is that of the seed `step`."""
    writer = Checkpoints(folder, keep, **kwargs)
    for step in steps:
        writer.save(step, full_state(step), VALUES)
    writer.close()
    return writer


def steps(folder):
    return [found.manifest.step for found in find_checkpoints(folder)]


@pytest.mark.parametrize("background", [True, False])
def test_everything_comes_back_into_the_live_tensors(tmp_path, background):
    writer = write(tmp_path / "checkpoints", 5, background=background)
    state = full_state(6)
    state["model.bias"] = torch.nn.Parameter(state["model.bias"])
    live = dict(state)
    manifest = load_newest(tmp_path, state, CONFIG)
    assert live["model.bias"].requires_grad
    assert_same(live | {"model.bias": live["model.bias"].detach()}, 5)
    assert live["model.conv.weight"].is_contiguous(memory_format=torch.channels_last)
    assert (manifest.path, manifest.step, manifest.values) == (writer.newest, 5, {**VALUES, "step": 5})
    assert manifest.tensors["meter.losses"] == ((25,), "float64")


def test_buffers_are_allocated_once():
    snapshot = Snapshot(rank=0, size=1)
    snapshot.allocate(full_state(1))
    seen = []
    for step in (1, 2):
        state = full_state(step)
        snapshot.begin(state)
        copies = snapshot.copy()
        assert_same(copies, step)
        assert all(copy.stride() == state[name].stride() for name, copy in copies.items())
        seen.append({name: copy.data_ptr() for name, copy in copies.items()})
    assert seen[0] == seen[1]


def test_the_state_of_its_step_is_written(tmp_path):
    """Weights change after `before_update`, counters and volatile tensors at once."""
    state = {f"model.{i}": torch.zeros(1 << 22) for i in range(4)}
    changing = {"optimizer.step": torch.zeros(()), "meter.frames": torch.zeros(24), "model.running": torch.zeros(24)}
    writer = Checkpoints(tmp_path, keep=100)
    for step in range(8):
        writer.save(step, state | changing, VALUES, volatile={"model.running"})
        for tensor in changing.values():
            tensor += 1
        writer.before_update()
        for tensor in state.values():
            tensor += 1
    writer.close()
    for found in find_checkpoints(tmp_path):
        seen = {name: torch.empty_like(tensor) for name, tensor in (state | changing).items()}
        load_checkpoint(found.path, seen, CONFIG)
        assert all((tensor == found.manifest.step).all() for tensor in seen.values())


def test_training_continues_while_the_disk_is_slow_and_the_next_save_counts_the_stall(tmp_path, monkeypatch):
    disk, sync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: disk.wait(30) and sync(file))
    writer = Checkpoints(tmp_path, keep=2)
    state = full_state(1)
    writer.save(1, state, VALUES)
    writer.before_update()
    for tensor in state.values():
        tensor.zero_()
    assert writer.newest is None
    assert (before := writer.stall_seconds) < 5
    threading.Timer(0.2, disk.set).start()
    writer.save(2, full_state(2), VALUES)
    assert writer.newest.name == "step_0000001"
    assert writer.stall_seconds > before
    writer.close()
    assert steps(tmp_path) == [2, 1]
    assert_newest(tmp_path / "step_0000001", 1)


def test_the_newest_few_and_every_nth_are_kept(tmp_path):
    write(tmp_path, 1, 2, 4, 5, 6, 7, 8, 9, keep=2, keep_every=4)
    assert steps(tmp_path) == [9, 8, 4]
    write(tmp_path, 10, keep=1)
    assert steps(tmp_path) == [10]
    # A second one of a step replaces the first.
    writer = Checkpoints(tmp_path, keep=3)
    writer.save(10, full_state(8), VALUES)
    writer.close()
    assert steps(tmp_path) == [10]
    assert_newest(tmp_path, 8)


def test_names_and_times_have_no_meaning(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", iter(range(10_000, 0, -1)).__next__)
    write(tmp_path, 9, 10, 100)
    (tmp_path / "step_0000100").rename(tmp_path / "best")
    (tmp_path / "step_0000009").rename(tmp_path / "step_0000999")
    os.utime(tmp_path / "best/checkpoint.json", (0, 0))
    assert assert_newest(tmp_path, 100).path == tmp_path / "best"
    assert Checkpoints(tmp_path, keep=2).newest == tmp_path / "best"
    write(tmp_path, 101, keep=2)
    assert steps(tmp_path) == [101, 100]


def test_partial_and_abandoned_ones_are_no_checkpoints(tmp_path):
    write(tmp_path, 1, 2, 3)
    set_aside_after(tmp_path, 2)
    write(tmp_path, 3)
    set_aside_after(tmp_path, 2)
    shutil.copytree(tmp_path / "step_0000002", tmp_path / "step_0000004.partial")
    assert steps(tmp_path) == [2, 1]
    Checkpoints(tmp_path, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_0000001", "step_0000002", "step_0000003.abandoned", "step_0000003.abandoned-2",
    ]  # fmt: skip


def test_another_model_and_other_tensors_are_named(tmp_path):
    write(tmp_path, 1)
    state = full_state(2)
    with pytest.raises(CheckpointError, match=r"depth 2 \(configured: 3\).* run.dir"):
        load_newest(tmp_path, state, {**CONFIG, "depth": 3})
    assert_same(state, 2)
    del state["model.bias"]
    state |= {"exp_avg.bias": torch.zeros(4), "model.extra": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        load_newest(tmp_path, state, CONFIG)
    assert all(name in str(caught.value) for name in ("exp_avg.bias (3,)", "model.bias (3,)", "model.extra missing"))
    assert "model.even" not in str(caught.value)


def test_without_a_checkpoint(tmp_path):
    assert load_newest(tmp_path / "checkpoints", full_state(1), CONFIG) is None
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "run", full_state(1), CONFIG)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_checkpoint(tmp_path, full_state(1), CONFIG)
    (tmp_path / "checkpoints/step_0000003.pt").touch()
    for path in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match=r"step_0000003.pt' .* fastmum 0.1, .*resume=never"):
            load_newest(path, full_state(1), CONFIG)


@pytest.mark.parametrize("prefix", ["model.", "exp_avg."])
def test_weights_only(tmp_path, prefix):
    write(tmp_path / "checkpoints", 3)
    expected = {n.removeprefix(prefix): t for n, t in full_state(3).items() if n.startswith(prefix)}
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/step_0000003"):
        manifest, tensors = read_weights(path, prefix)
        assert manifest.step == 3
        torch.testing.assert_close(tensors, expected, rtol=0, atol=0)

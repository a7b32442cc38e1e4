import json
import logging
import os
import shutil
import threading

import pytest
import torch
from states import ABOUT, CONFIG, full_state

from fastmum.engine.checkpoint import (
    CheckpointError,
    Checkpoints,
    find_checkpoints,
    load_checkpoint,
    load_newest,
    read_weights,
    set_aside_after,
)
from fastmum.engine.checkpoint.snapshot import Snapshot

MODES = pytest.mark.parametrize("background", [True, False])


def write(folder, *steps, keep=10, **kwargs):
    """Checkpoints whose state is that of the seed `step`."""
    writer = Checkpoints(folder, keep, **kwargs)
    for step in steps:
        writer.save(step, full_state(step), ABOUT)
    writer.close()
    return writer


def steps(folder):
    return [found.manifest.step for found in find_checkpoints(folder)]


def same(state, seed):
    torch.testing.assert_close(state, full_state(seed), rtol=0, atol=0)


@MODES
def test_everything_comes_back_into_the_live_tensors(tmp_path, background):
    writer = write(tmp_path / "checkpoints", 5, background=background)
    state = full_state(6)
    live = dict(state)
    about = load_newest(tmp_path, state, CONFIG)
    same(live, 5)
    assert live["model.conv.weight"].is_contiguous(memory_format=torch.channels_last)
    assert (about.path, about.step, about.values["model_config"]) == (writer.newest, 5, CONFIG)
    assert about.values == {**ABOUT, "step": 5}
    assert about.tensors["meter.losses"] == ((25,), "float64")


def test_memory_for_copies_is_taken_once():
    snapshot = Snapshot(rank=0, size=1)
    snapshot.allocate(full_state(1))
    seen = []
    for step in (1, 2):
        state = full_state(step)
        snapshot.begin(state)
        copies = snapshot.copy()
        same(copies, step)
        assert all(copy.stride() == state[name].stride() for name, copy in copies.items())
        seen.append({name: copy.data_ptr() for name, copy in copies.items()})
    assert seen[0] == seen[1]


def test_memory_taken_beforehand_is_used(tmp_path):
    writer = Checkpoints(tmp_path, keep=2)
    writer.prepare(full_state(1))
    writer.save(2, full_state(2), ABOUT)
    writer.close()
    state = full_state(9)
    load_newest(tmp_path, state, CONFIG)
    same(state, 2)


def test_parameters_that_ask_for_gradients(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 4))
    before = weight.detach().clone()
    writer = Checkpoints(tmp_path, keep=1)
    writer.save(1, {"model.weight": weight}, ABOUT)
    writer.wait()
    torch.nn.init.zeros_(weight)
    load_newest(tmp_path, {"model.weight": weight}, CONFIG)
    assert torch.equal(weight.detach(), before)
    assert weight.requires_grad


def test_what_is_written_is_the_state_of_its_step(tmp_path):
    """Updates come as soon as they may, and counters change at once: neither shows in the checkpoint."""
    state = {f"model.{i}": torch.zeros(1 << 22) for i in range(4)}
    state |= {"optimizer.step": torch.zeros(()), "meter.frames": torch.zeros(24)}
    writer = Checkpoints(tmp_path, keep=100)
    for step in range(8):
        writer.save(step, state, ABOUT)
        state["optimizer.step"] += 1
        state["meter.frames"] += 1
        writer.before_update()
        for i in range(4):
            state[f"model.{i}"] += 1
    writer.close()
    for found in find_checkpoints(tmp_path):
        seen = {name: torch.empty_like(tensor) for name, tensor in state.items()}
        load_checkpoint(found.path, seen, CONFIG)
        assert all((tensor == found.manifest.step).all() for tensor in seen.values())


def test_training_goes_on_while_the_disk_is_slow(tmp_path, monkeypatch):
    disk = threading.Event()
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: disk.wait(30) and sync(file))
    writer = Checkpoints(tmp_path, keep=1)
    state = full_state(1)
    writer.save(1, state, ABOUT)
    writer.before_update()
    for tensor in state.values():
        tensor.zero_()
    assert writer.newest is None
    assert writer.stall_seconds < 5
    disk.set()
    writer.wait()
    assert writer.newest.is_dir()
    loaded = full_state(9)
    load_newest(tmp_path, loaded, CONFIG)
    same(loaded, 1)


def test_a_second_one_waits_for_the_first_and_that_counts(tmp_path, monkeypatch):
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: threading.Event().wait(0.2) or sync(file))
    writer = Checkpoints(tmp_path, keep=2)
    writer.save(1, full_state(1), ABOUT)
    alone = writer.stall_seconds
    writer.save(2, full_state(2), ABOUT)
    assert writer.newest.name == "step_0000001"
    assert writer.stall_seconds > alone + 0.2
    writer.close()
    assert steps(tmp_path) == [2, 1]


def test_the_newest_few_and_every_nth_are_kept(tmp_path):
    write(tmp_path, 1, 2, 4, 5, 6, 7, 8, 9, keep=2, keep_every=4)
    assert steps(tmp_path) == [9, 8, 4]
    write(tmp_path, 10, keep=1)
    assert steps(tmp_path) == [10]


def test_content_says_which_is_the_newest(tmp_path):
    write(tmp_path, 9, 10, 100)
    (tmp_path / "step_0000100").rename(tmp_path / "best")
    (tmp_path / "step_0000009").rename(tmp_path / "step_0000999")
    os.utime(tmp_path / "best", (0, 0))
    os.utime(tmp_path / "best/checkpoint.json", (0, 0))
    state = full_state(1)
    assert load_newest(tmp_path, state, CONFIG).path == tmp_path / "best"
    same(state, 100)
    assert Checkpoints(tmp_path, keep=2).newest == tmp_path / "best"
    write(tmp_path, 101, keep=2)
    assert steps(tmp_path) == [101, 100]


def test_one_of_a_step_that_there_has_been_replaces_it(tmp_path):
    write(tmp_path, 7)
    writer = Checkpoints(tmp_path, keep=3)
    writer.save(7, full_state(8), ABOUT)
    writer.close()
    assert steps(tmp_path) == [7]
    state = full_state(1)
    load_newest(tmp_path, state, CONFIG)
    same(state, 8)


def test_a_half_written_one_is_no_checkpoint_and_goes_at_the_next_start(tmp_path):
    write(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "step_0000002", tmp_path / "step_0000003.partial")
    assert steps(tmp_path) == [2, 1]
    Checkpoints(tmp_path, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000001", "step_0000002"]


def test_another_branch_is_set_aside(tmp_path):
    write(tmp_path, 1, 2, 3)
    set_aside_after(tmp_path, 2)
    assert steps(tmp_path) == [2, 1]
    assert (tmp_path / "step_0000003.abandoned").is_dir()
    write(tmp_path, 3)
    set_aside_after(tmp_path, 2)
    assert steps(tmp_path) == [2, 1]
    assert (tmp_path / "step_0000003.abandoned-2").is_dir()


def test_another_model_is_named(tmp_path):
    write(tmp_path, 1)
    state = full_state(2)
    with pytest.raises(CheckpointError, match=r"another model: depth 2 \(configured: 3\); choose another run.dir"):
        load_newest(tmp_path, state, {**CONFIG, "depth": 3})
    same(state, 2)


def test_other_tensors_are_named(tmp_path):
    write(tmp_path, 1)
    state = full_state(2)
    del state["model.bias"]
    state["exp_avg.bias"] = torch.zeros(4)
    state["model.extra"] = torch.zeros(1)
    with pytest.raises(
        CheckpointError,
        match=r"exp_avg.bias \(3,\) \(expected: \(4,\)\), model.bias \(3,\) .*, model.extra missing",
    ):
        load_newest(tmp_path, state, CONFIG)


def test_where_there_is_none(tmp_path):
    assert load_newest(tmp_path / "checkpoints", full_state(1), CONFIG) is None
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "run", full_state(1), CONFIG)
    (tmp_path / "files").mkdir()
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        load_checkpoint(tmp_path, full_state(1), CONFIG)


def test_checkpoints_of_the_first_version_are_not_passed_over(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step_0000003.pt").touch()
    for path in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match=r"step_0000003.pt' is a checkpoint of fastmum 0.1, .*resume=never"):
            load_newest(path, full_state(1), CONFIG)


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    for step, now in ((1, 2e9), (2, 0.0), (3, 1e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        write(tmp_path, step, keep=2)
        os.utime(tmp_path / f"step_{step:07d}", (now, now))
    assert steps(tmp_path) == [3, 2]


def test_what_is_said_about_it_must_be_json(tmp_path):
    writer = Checkpoints(tmp_path, keep=1)
    with pytest.raises(TypeError, match="JSON"):
        writer.save(1, full_state(1), {"model_config": torch.zeros(1)})
    writer.before_update()
    writer.close()


def test_weights_alone(tmp_path):
    write(tmp_path / "checkpoints", 3)
    expected = {n.removeprefix("model."): t for n, t in full_state(3).items() if n.startswith("model.")}
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/step_0000003"):
        about, tensors = read_weights(path)
        assert about.step == 3
        torch.testing.assert_close(tensors, expected, rtol=0, atol=0)


def test_a_folder_that_cannot_be_made_is_logged_and_the_next_is_tried(tmp_path, caplog):
    (tmp_path / "checkpoints").write_text("in the way")
    writer = Checkpoints(tmp_path / "checkpoints", keep=1)
    writer.save(1, full_state(1), ABOUT)
    writer.before_update()
    with pytest.raises(CheckpointError, match=r"checkpoints/step_0000001' could not be written \(.*irectory"):
        writer.wait()
    assert (writer.failed, writer.newest) == (1, None)
    (line,) = [r for r in caplog.records if r.levelno == logging.ERROR and r.name.startswith("fastmum")]
    assert "training continues" in line.message
    assert "\n" not in line.message
    (tmp_path / "checkpoints").unlink()
    writer.save(2, full_state(2), ABOUT)
    writer.close()
    assert (writer.failed, steps(tmp_path)) == (1, [2])


def test_the_manifest_is_for_people_too(tmp_path):
    write(tmp_path, 1)
    content = json.loads((tmp_path / "step_0000001/checkpoint.json").read_text())["content"]
    assert (content["step"], content["values"]["model_config"]) == (1, CONFIG)

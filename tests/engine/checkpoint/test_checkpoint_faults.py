"""Processes killed while they write, disks that fill up."""

import contextlib
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from processes import FORKSERVER
from states import CONFIG, VALUES, assert_newest

from fastmum.engine.checkpoint import CheckpointError, Checkpoints, find_checkpoints, load_newest


def counting_state(step, size):
    """1 MB times `size`, filled with the step."""
    return {f"model.{i}": torch.full((size << 16,), float(step)) for i in range(4)}


def load_step(folder, size):
    """The step of the newest checkpoint, 0 if there is none, and its state."""
    state = counting_state(0, size)
    manifest = load_newest(folder, state, CONFIG)
    step = manifest.step if manifest else 0
    assert all((tensor == step).all() for tensor in state.values())
    return step, state


def write_until_killed(folder, pipe):
    """Resume from the newest checkpoint, write one per step, and send the steps of those published."""
    torch.set_num_threads(1)
    step, state = load_step(folder, 4)
    writer = Checkpoints(folder, keep=2)
    pipe.send(step)
    while True:
        step += 1
        writer.before_update()
        for tensor in state.values():
            tensor.fill_(step)
        writer.save(step, state, VALUES)
        if writer.newest:
            pipe.send(find_checkpoints(writer.newest)[0].manifest.step)


@pytest.mark.parametrize("times", [20, pytest.param(400, marks=pytest.mark.exhaustive)])
def test_killed_at_random_moments_an_intact_checkpoint_remains(tmp_path, times):
    rng = random.Random(os.getpid())
    partial = published = 0
    for _ in range(times):
        ours, theirs = FORKSERVER.Pipe()
        process = FORKSERVER.Process(target=write_until_killed, args=(tmp_path, theirs))
        process.start()
        theirs.close()
        assert ours.recv() >= published
        time.sleep(rng.uniform(0.01, 0.2))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while ours.poll():
                published = ours.recv()
        partial += any(not (path / "checkpoint.json").exists() for path in tmp_path.iterdir())
        assert load_step(tmp_path, 4)[0] >= published
    assert partial, "no process was killed in the middle of a checkpoint"


@pytest.mark.parametrize("small_disk", ["6m"], indirect=True)
def test_a_full_disk_drops_the_checkpoints_that_do_not_fit(small_disk):
    writer = Checkpoints(small_disk, keep=1)
    for step, ballast, failed, there in ((1, 0, 0, 1), (2, 3_000_000, 1, 1), (3, 3_900_000, 2, 1), (4, 0, 2, 4)):
        (small_disk / "ballast").write_bytes(bytes(ballast))
        writer.save(step, counting_state(step, 2), VALUES)
        writer.before_update()
        if there == step:
            writer.wait()
        else:
            with pytest.raises(CheckpointError, match=rf"/step_000000{step}' .*\(No space left on device\)"):
                writer.wait()
        assert writer.failed == failed
        assert [path.name for path in small_disk.iterdir() if path.is_dir()] == [f"step_000000{there}"]
        assert load_step(small_disk, 2)[0] == there


EXITS = """
import os, sys, time
from pathlib import Path
from states import VALUES, full_state
from fastmum.engine.checkpoint import Checkpoints

sync = os.fsync
os.fsync = lambda file: (time.sleep(0.2), sync(file))  # a slow disk
writer = Checkpoints(Path(sys.argv[1]), keep=1)
writer.save(3, full_state(3), VALUES)
sys.exit(2)
"""


def test_a_process_that_exits_while_writing_finishes_the_checkpoint(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", EXITS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (2, "")
    assert assert_newest(tmp_path, 3).step == 3

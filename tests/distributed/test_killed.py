"""Real faults: processes killed, suspended and signalled at any moment."""

import os
import random
import signal
import time

import pytest
from crew import SMALL

from fastmum.engine.checkpoint import find_checkpoints
from fastmum.engine.metrics import read_metrics
from fastmum.engine.stop import REQUEUE

KILLS = 20
ENDLESS = (
    "train.steps=100000", "model.compile=off", "train.eval_every=100000", "train.picture_every=100000",
    "train.checkpoint_every=50",
)  # fmt: skip


def wait_for(condition, what, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


def reached(run, step):
    return lambda: any(r["step"] >= step for r in read_metrics(run / "metrics.jsonl"))


def losses(run):
    return [(r["step"], r["loss"], r.get("held_out_loss"), r["grad_norm"]) for r in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize(
    "background", [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.exhaustive)]
)
def test_killed_at_20_random_moments_it_resumes_bit_for_bit(start, tmp_path, background):
    """With a checkpoint every other step, most moments are while one is written."""
    words = ("train.steps=60", "train.checkpoint_every=2", "train.eval_every=20", "data.frames_per_step=12",
             "train.precision=bf16", f"train.checkpoint_async={background}")  # fmt: skip
    run, whole = tmp_path / "run", tmp_path / "whole"
    (process,) = start(1, *SMALL, *words, f"run.dir={whole}")
    process.join()
    assert process.exitcode == 0, (tmp_path / "words-0").read_text()
    rng = random.Random(0)
    kills = 0
    while kills < KILLS and not reached(run, 60)():
        (process,) = start(1, *SMALL, *words)
        # Some time after its first step, or before it; 20 times that are fewer steps than the run has.
        first = max((r["step"] for r in read_metrics(run / "metrics.jsonl")), default=0)
        wait_for(reached(run, first + 1 - kills % 2), "a step")
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.join()
        kills += 1
    assert kills >= KILLS // 2, "the run was too short to be killed often"
    (process,) = start(1, *SMALL, *words)
    process.join()
    assert process.exitcode == 0, (tmp_path / "words-0").read_text()
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])  # rank 0 holds the store
def test_the_others_exit_and_name_a_rank_that_is_gone(start, tmp_path, number, rank):
    processes = start(3, *SMALL, *ENDLESS, "parallel.dead_after_s=2", "data.frames_per_step=18")
    wait_for(reached(tmp_path / "run", 3), "a step")
    os.kill(processes[rank].pid, number)
    began = time.monotonic()
    for other in {0, 1, 2} - {rank}:
        processes[other].join(timeout=60)
        assert processes[other].exitcode == 2, f"rank {other} goes on"
        words = (tmp_path / f"words-{other}").read_text()
        assert f"error: rank {rank}" in words
        if rank:
            assert f"process {processes[rank].pid}) died or hangs" in words
    assert time.monotonic() - began < 60


def test_the_others_name_a_process_that_fails_and_why(start, tmp_path, image_folder):
    processes = start(2, *SMALL, *ENDLESS, "parallel.dead_after_s=2", "data.frames_per_step=12", "data.cache_gb=0")
    wait_for(reached(tmp_path / "run", 3), "a step")
    for scene in image_folder.iterdir():
        for image in scene.iterdir():
            image.write_bytes(b"broken")
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 2
    every = [(tmp_path / f"words-{rank}").read_text() for rank in range(2)]
    assert any("error: " in words and "cannot be decoded" in words for words in every), every


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_makes_all_save_the_same_step(start, tmp_path, number):
    processes = start(2, *SMALL, *ENDLESS, "data.frames_per_step=12")
    wait_for(reached(tmp_path / "run", 3), "a step")
    os.kill(processes[1].pid, number)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == REQUEUE
    assert f"{signal.Signals(number).name}: saved at step" in (tmp_path / "words-0").read_text()
    newest = find_checkpoints(tmp_path / "run")[0].manifest
    assert newest.step == read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"]

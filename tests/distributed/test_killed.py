"""Real faults: processes killed, suspended and signalled at any moment."""

import os
import random
import signal
import time

import pose_runs
import pytest
import reconstruction_runs
import roma_runs
from processes import wait_for
from runs import SMALL, numbers
from tiny_task import TINY

from fastmum.engine.checkpoint import find_checkpoints
from fastmum.engine.stop import REQUEUE

MUM = [*SMALL, "train.precision=fp32", "data.frames_per_step=12", "model.compile=off"]
DOWNSTREAM = (pose_runs.SMALL, roma_runs.TINY, reconstruction_runs.TINY_RUN)
ENDLESS = [f"train.{key}=100000" for key in ("steps", "eval_every", "picture_every")] + ["train.checkpoint_every=50"]


def reached(run, step):
    return lambda: any(record["step"] >= step for record in numbers(run))


@pytest.mark.parametrize(
    ("args", "kills", "steps"),
    [
        (TINY, 4, 40),
        ([*TINY, "train.precision=bf16", "optim.optimizer=muon"], 4, 40),
        pytest.param([*MUM, "train.precision=bf16", "optim.optimizer=muon"], 20, 60, marks=pytest.mark.slow),
        *(pytest.param([*args, "train.log_every=1"], 4, 20, marks=pytest.mark.slow) for args in DOWNSTREAM),
        pytest.param([*MUM, "train.checkpoint_async=false"], 20, 60, marks=pytest.mark.exhaustive),
    ],
)
def test_killed_at_random_moments_it_resumes_bit_for_bit(start, tmp_path, args, kills, steps):
    """With a checkpoint every other step, most moments are while one is written."""
    args = [*args, f"train.steps={steps}", "train.checkpoint_every=2", "train.eval_every=20"]
    run, whole, rng = tmp_path / "run", tmp_path / "whole", random.Random(0)

    def finish(*more):
        (process,) = start(1, *args, *more)
        process.join()
        assert process.exitcode == 0, (tmp_path / "log-0").read_text()

    finish(f"run.dir={whole}")
    killed = 0
    while killed < kills and not reached(run, steps)():
        (process,) = start(1, *args)
        # Some time after the first step of this process, or before it.
        first = max((record["step"] for record in numbers(run)), default=0)
        wait_for(reached(run, first + 1 - killed % 2), "a step")
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.join()
        killed += 1
    assert killed >= kills // 2, "the run was too short to be killed often"
    finish()
    assert numbers(run) == numbers(whole)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])  # rank 0 holds the store
def test_the_others_exit_and_name_a_dead_rank(start, tmp_path, number, rank):
    processes = start(3, *MUM, *ENDLESS, "parallel.dead_after_s=4", "data.frames_per_step=18")
    wait_for(reached(tmp_path / "run", 3), "a step")
    os.kill(processes[rank].pid, number)
    for other in {0, 1, 2} - {rank}:
        processes[other].join(timeout=60)
        assert processes[other].exitcode == 2, f"rank {other} goes on"
        log = (tmp_path / f"log-{other}").read_text()
        assert f"error: rank {rank}" in log
        if rank:
            assert f"process {processes[rank].pid})" in log


@pytest.mark.slow
def test_no_process_is_stuck_while_one_advances_in_opening_data(start, tmp_path):
    """The first opens its data before the others; each takes longer than `stuck_after_s`, as with caches of its own."""
    limits = "parallel.dead_after_s=4", "parallel.stuck_after_s=5"
    for process in start(2, *TINY, "train.steps=2", "train.eval_every=2", *limits, "tiny.slow=[12,12]"):
        process.join(timeout=90)
        assert process.exitcode == 0, [(tmp_path / f"log-{rank}").read_text() for rank in range(2)]


def test_the_others_report_the_error_of_a_rank(start, tmp_path, image_folder):
    processes = start(2, *MUM, *ENDLESS, "parallel.dead_after_s=4", "data.cache_gb=0")
    wait_for(reached(tmp_path / "run", 3), "a step")
    for image in image_folder.glob("*/*"):
        image.write_bytes(b"broken")
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 2
    logs = [(tmp_path / f"log-{rank}").read_text() for rank in range(2)]
    assert any("error: " in log and "data set 'folder' cannot be decoded" in log for log in logs), logs


def test_bad_frames_of_all_processes_together_stop_the_run(start, tmp_path, image_folder):
    for number in (0, 1):
        (image_folder / f"scene1/{number}.png").write_bytes(b"broken")
    processes = start(2, *MUM, *ENDLESS)
    for rank, process in enumerate(processes):
        process.join(timeout=90)
        log = (tmp_path / f"log-{rank}").read_text()
        assert process.exitcode == 2, log
        assert "% of the frames of the data set 'folder' cannot be decoded (8 sequences" in log, "4 in each process"
    assert find_checkpoints(tmp_path / "run")[0].manifest.step > 0


@pytest.mark.parametrize(
    ("args", "size", "step"),
    [
        (TINY, 1, 10),
        (TINY, 2, 10),  # the others write a checkpoint before they know
        pytest.param([*TINY, "parallel.strategy=fsdp2"], 2, 20, marks=pytest.mark.slow),  # the last step
        pytest.param(TINY, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_data_error_saves_the_last_whole_step_first(start, tmp_path, args, size, step):
    """All processes save and exit with the code of a data error; the resumed run equals one without an error."""
    run, whole = tmp_path / "run", tmp_path / "whole"

    def finish(code, *more):
        processes = start(size, *args, *more)
        for process in processes:
            process.join(timeout=60)
        logs = [(tmp_path / f"log-{rank}").read_text() for rank in range(size)]
        assert [process.exitcode for process in processes] == [code] * size, logs
        return logs

    finish(0, f"run.dir={whole}")
    logs = finish(2, f"tiny.fails_at={step}")
    assert all(sum("the data are damaged" in line for line in log.splitlines()) == 1 for log in logs), logs
    found = find_checkpoints(run)
    assert [each.manifest.step for each in found[:1]] == [step - 1][: step - 1]
    finish(0)
    assert numbers(run) == numbers(whole)


@pytest.mark.parametrize(("args", "number"), [(MUM, signal.SIGUSR1), (TINY, signal.SIGTERM)])
def test_a_signal_to_one_process_makes_all_save_the_same_step(start, tmp_path, args, number):
    processes = start(2, *args, *ENDLESS)
    wait_for(reached(tmp_path / "run", 3), "a step")
    os.kill(processes[1].pid, number)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == REQUEUE
    assert f"{number.name}: saved at step" in (tmp_path / "log-0").read_text()
    assert find_checkpoints(tmp_path / "run")[0].manifest.step == numbers(tmp_path / "run")[-1]["step"]

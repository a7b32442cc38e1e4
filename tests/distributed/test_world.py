"""Ranks, devices, signals, heartbeats."""

import os
import signal
import time

import pytest
import torch
from processes import wait_for

from fastmum.config import ConfigError
from fastmum.engine.device import pick_device, pick_precision
from fastmum.engine.distributed import (
    DistContext,
    DistributedError,
    LaunchInfo,
    _set_slurm_address,
    init_distributed,
    read_launch_env,
)
from fastmum.engine.heartbeat import Heartbeat, PeerError
from fastmum.engine.stop import REQUEUE, SIGNALS, StopConsensus, Stopped, StopRequest, exit_code

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, LaunchInfo()),
        (TORCHRUN, LaunchInfo(3, 8, 1, 2, "torchrun")),
        (SRUN, LaunchInfo(5, 16, 1, 4, "srun")),
        (SRUN | TORCHRUN, LaunchInfo(3, 8, 1, 2, "torchrun")),  # torchrun within a SLURM job
        (SRUN | {"WORLD_SIZE": "16", **ADDRESS}, LaunchInfo(5, 16, 1, 4, "srun")),  # exported by the batch script
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, LaunchInfo()),  # a batch script without srun
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, LaunchInfo(launcher="torchrun")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, LaunchInfo(launcher="torchrun")),
        ({"WORLD_SIZE": "1"}, LaunchInfo()),
    ],
)
def test_launch_environment(environ, launch):
    assert read_launch_env(environ) == launch


@pytest.mark.parametrize(
    ("more", "local_size"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 8),
        ({"SLURM_TASKS_PER_NODE": "8(x2)"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "16"}, 16),
        ({"SLURM_STEP_TASKS_PER_NODE": "6(x2),4", "SLURM_NODEID": "2"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,12", "SLURM_NODEID": "1", "SLURM_TASKS_PER_NODE": "8(x2)"}, 12),
        ({"SLURM_TASKS_PER_NODE": "8(x4)"}, 16),  # of the job; this step has half of it
    ],
)
def test_processes_of_a_machine_on_slurm(more, local_size):
    environ = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}
    assert read_launch_env(environ | more).local_size == local_size


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (TORCHRUN | {"RANK": "x"}, "RANK"),
        (TORCHRUN | {"RANK": "9" * 5000}, "RANK"),
        (TORCHRUN | {"RANK": "8"}, "RANK"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "WORLD_SIZE"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE"),
        ({"RANK": "3", "WORLD_SIZE": "8"}, "LOCAL_RANK"),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, "LOCAL_WORLD_SIZE"),
        ({"WORLD_SIZE": "8"}, "RANK"),
        ({"RANK": "3"}, "WORLD_SIZE"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8(x"}, "SLURM_STEP_TASKS_PER_NODE"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8(x99999999999)"}, "SLURM_STEP_TASKS_PER_NODE"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4,12"}, "SLURM_NODEID"),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16"}, "SLURM_LOCALID"),
    ],
)
def test_errors_of_the_launch_environment(environ, named):
    with pytest.raises(DistributedError, match=rf"\b{named}\b"):
        read_launch_env(environ)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"MASTER_PORT": "1"}, "MASTER_ADDR"),
        (ADDRESS | {"MASTER_PORT": "port"}, "MASTER_PORT"),
        (ADDRESS | {"MASTER_PORT": "65536"}, "MASTER_PORT"),
        ({"SLURM_JOB_ID": "7_1", "MASTER_ADDR": "here"}, "SLURM_JOB_ID"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "bad"}, "MASTER_ADDR"),  # scontrol prints nothing
    ],
)
def test_errors_of_the_address(environ, named, slurm):
    slurm(environ, "")
    with pytest.raises(DistributedError, match=rf"\b{named}\b"):
        init_distributed(LaunchInfo(1, 2, 1, 2, "srun"), torch.device("cpu"))


def test_rank_0_is_on_the_first_node_of_the_step(slurm):
    slurm({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a[1-4]", "SLURM_STEP_NODELIST": "a[3-4]"}, 'echo "$3-first"')
    _set_slurm_address()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("a[3-4]-first", "20007")


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """Sets the variables of an address, and the body of a script `scontrol`."""

    def set_up(environ, scontrol):
        for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_JOB_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{scontrol}\n")
        (tmp_path / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return set_up


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto", LaunchInfo()) == torch.device("cpu")
    with pytest.raises(ConfigError, match="0 CUDA devices"):
        pick_device("cuda", LaunchInfo())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device("auto", LaunchInfo(5, 8, 1, 4)) == torch.device("cuda", 1)
    assert pick_device("cuda:3", LaunchInfo()) == torch.device("cuda", 3)
    with pytest.raises(ConfigError, match=r"train\.device"):
        pick_device("cuda:3", LaunchInfo(0, 2, 0, 2))
    with pytest.raises(ConfigError, match="process 4 of 8"):
        pick_device("cuda", LaunchInfo(4, 8, 4, 8))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    # srun can show each task only its own device.
    assert pick_device("cuda", LaunchInfo(5, 8, 1, 4)) == torch.device("cuda", 0)


@pytest.mark.parametrize("fast", [True, False])
def test_precision(monkeypatch, caplog, fast):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    cpu = torch.device("cpu")
    assert pick_precision("auto", cpu) == ("bf16" if fast else "fp32")
    assert pick_precision("auto", torch.device("cuda")) == "bf16"
    assert not caplog.records
    assert pick_precision("bf16", cpu) == "bf16"
    assert bool(caplog.records) != fast


def test_the_first_signal_is_recorded_and_a_second_interrupt_acts_at_once():
    # Processes in the background inherit that SIGINT is ignored.
    sigint = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGUSR1) == before, "before the first step there is nothing to save"
        stop.begin()
        stop.begin()
        assert stop.signal is None
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        assert stop.signal == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before
    assert [exit_code(n) for n in SIGNALS] == [130, REQUEUE, REQUEUE, REQUEUE]
    with StopRequest() as stop:
        stop.begin()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, sigint)


def test_a_hangup_is_recorded_unless_the_parent_ignored_it():
    before = signal.getsignal(signal.SIGHUP)
    for handler, recorded in ((signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, None)):
        signal.signal(signal.SIGHUP, handler)
        with StopRequest() as stop:
            stop.begin()
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal == recorded
    signal.signal(signal.SIGHUP, before)


def test_a_single_process_has_its_own_consensus():
    consensus = StopConsensus(DistContext())
    assert [consensus.largest(n) for n in (0, 15, 0)] == [0, 15, 0]
    assert consensus.finish() == 0


@pytest.fixture
def pair(monkeypatch):
    """The contexts of two ranks that share a store."""
    monkeypatch.setattr(DistContext, "wait", lambda self: None)
    store = torch.distributed.HashStore()
    return [DistContext(rank=rank, size=2, store=store) for rank in range(2)]


@pytest.mark.parametrize("main_thread_fails", [False, True])
def test_a_rank_without_heartbeats_is_named(pair, main_thread_fails):
    """By the watching thread, or by the main thread if its collective operation failed."""
    lines, name = [], "rank 1 (there, process 7)"
    for key, value in {"name/1": name, "left/1": "", "beat/1": "0 0"}.items():
        Heartbeat(pair[1], 1.0, 60.0)._store.set(key, value)  # as when rank 1 starts
    try:
        with Heartbeat(pair[0], 1.0, 60.0, lines.append):
            if main_thread_fails:
                raise RuntimeError("gloo/transport/tcp/pair.cc: connection closed by peer")
            wait_for(lambda: lines)
    except PeerError as error:
        assert not lines
        lines.append(error)
    assert len(lines) == 1
    assert str(lines[0]).startswith(name)
    assert "1 s" in str(lines[0])


def test_a_rank_that_fails_is_named_with_its_error_and_a_finished_one_is_not(pair):
    lines = []
    with (
        Heartbeat(pair[0], 1.0, 60.0, lines.append),
        pytest.raises(ValueError, match="broken"),
        Heartbeat(pair[1], 1.0, 60.0),
    ):
        raise ValueError("broken")
    with Heartbeat(pair[0], 1.0, 60.0, lines.append):
        wait_for(lambda: lines)
    assert "ValueError: broken" in str(lines[0])
    lines.clear()
    with Heartbeat(pair[0], 0.5, 60.0, lines.append):
        with Heartbeat(pair[1], 0.5, 60.0):
            pass
        time.sleep(1.5)
    assert not lines


def test_the_rank_whose_main_thread_makes_no_progress_is_named(pair):
    """Ranks in front of it wait for it, and make no progress either."""
    lines = []
    for number in range(2):
        pair[number].progress[0] = 5 - number
    with Heartbeat(pair[0], 1.0, 0.5, lines.append), Heartbeat(pair[1], 1.0, 0.5, lines.append):
        wait_for(lambda: len(lines) == 2)
    assert all(str(line).startswith("rank 1") and "parallel.stuck_after_s" in str(line) for line in lines)
    lines.clear()
    with Heartbeat(pair[0], 1.0, 2.0, lines.append), Heartbeat(pair[1], 1.0, 2.0, lines.append):
        for _ in range(30):
            for each in pair:
                each.advance()
            time.sleep(0.1)
    assert not lines


def test_a_signal_during_the_start_of_one_rank_ends_the_others_with_its_code(pair):
    errors = []
    with Heartbeat(pair[0], 1.0, 60.0, errors.append):
        with pytest.raises(Stopped), Heartbeat(pair[1], 1.0, 60.0):
            raise Stopped(signal.SIGTERM)
        wait_for(lambda: errors)
    assert errors[0].code == REQUEUE
    assert "SIGTERM" in str(errors[0])


@pytest.mark.parametrize("name", ["time", "monotonic"])  # set by someone; all processes were suspended
def test_a_clock_that_jumps_kills_no_rank(pair, monkeypatch, name):
    lines, clock = [], getattr(time, name)
    with Heartbeat(pair[0], 1.0, 60.0, lines.append), Heartbeat(pair[1], 1.0, 60.0, lines.append):
        for jump in (1e6, -1e6):
            monkeypatch.setattr(time, name, lambda jump=jump: clock() + jump)
            time.sleep(1.2)
    assert not lines

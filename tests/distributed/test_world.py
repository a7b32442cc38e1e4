"""Ranks, devices, signals, heartbeats."""

import signal
import time

import pytest
import torch
from processes import wait_for

from fastmum.config import ConfigError
from fastmum.engine.device import pick_device, pick_precision
from fastmum.engine.distributed import DistContext, DistributedError, LaunchInfo, init_distributed, read_launch_env
from fastmum.engine.heartbeat import Heartbeat, PeerError
from fastmum.engine.stop import REQUEUE, StopConsensus, StopRequest, exit_code

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, LaunchInfo()),
        (TORCHRUN, LaunchInfo(3, 8, 1, 2, "torchrun")),
        (SRUN, LaunchInfo(5, 16, 1, 4, "srun")),
        (SRUN | TORCHRUN, LaunchInfo(3, 8, 1, 2, "torchrun")),  # torchrun within a SLURM job
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, LaunchInfo()),  # a batch script without srun
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, LaunchInfo(launcher="torchrun")),
    ],
)
def test_launch_environment(environ, launch):
    assert read_launch_env(environ) == launch


def test_errors_of_the_launch_environment(monkeypatch):
    for rank in ("x", "8"):
        with pytest.raises(DistributedError, match=r"torchrun|RANK"):
            read_launch_env(TORCHRUN | {"RANK": rank})
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(DistributedError, match=r"^MASTER_ADDR"):
        init_distributed(LaunchInfo(1, 2), torch.device("cpu"))


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
        assert stop.signal is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before
    assert [exit_code(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == [130, REQUEUE, REQUEUE]
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, sigint)


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
    for key, value in {"name/1": name, "left/1": "", "beat/1": "0"}.items():
        Heartbeat(pair[1], 1.0)._store.set(key, value)  # as when rank 1 starts
    try:
        with Heartbeat(pair[0], 1.0, lines.append):
            if main_thread_fails:
                raise RuntimeError("gloo/transport/tcp/pair.cc: connection closed by peer")
            wait_for(lambda: lines)
    except PeerError as error:
        assert not lines
        lines.append(str(error))
    assert len(lines) == 1
    assert lines[0].startswith(name)
    assert "1 s" in lines[0]


def test_a_rank_that_fails_is_named_with_its_error_and_a_finished_one_is_not(pair):
    lines = []
    with Heartbeat(pair[0], 1.0, lines.append), pytest.raises(ValueError, match="broken"), Heartbeat(pair[1], 1.0):
        raise ValueError("broken")
    with Heartbeat(pair[0], 1.0, lines.append):
        wait_for(lambda: lines)
    assert "ValueError: broken" in lines[0]
    lines.clear()
    with Heartbeat(pair[0], 0.5, lines.append):
        with Heartbeat(pair[1], 0.5):
            pass
        time.sleep(1.5)
    assert not lines


def test_a_wall_clock_that_jumps_kills_no_rank(pair, monkeypatch):
    lines, clock = [], time.time
    with Heartbeat(pair[0], 1.0, lines.append), Heartbeat(pair[1], 1.0, lines.append):
        for jump in (1e6, -1e6):
            monkeypatch.setattr(time, "time", lambda jump=jump: clock() + jump)
            time.sleep(1.2)
    assert not lines

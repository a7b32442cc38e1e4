"""Who a process is, where it computes, what it is told; signs of life."""

import signal
import time

import pytest
import torch

from fastmum.config import ConfigError
from fastmum.engine.device import pick_device, pick_precision
from fastmum.engine.distributed import DistContext, DistributedError, LaunchInfo, init_distributed, read_launch_env
from fastmum.engine.heartbeat import Heartbeat
from fastmum.engine.stop import REQUEUE, StopConsensus, StopRequest, exit_code

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, LaunchInfo()),
        (TORCHRUN, LaunchInfo(3, 8, 1, 2, "torchrun")),
        (SRUN, LaunchInfo(5, 16, 1, 4, "srun")),
        (SRUN | TORCHRUN, LaunchInfo(3, 8, 1, 2, "torchrun")),  # torchrun within a SLURM job
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, LaunchInfo()),  # a batch script without srun
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, LaunchInfo(launcher="torchrun")),
    ],
)
def test_place(environ, place):
    assert read_launch_env(environ) == place


@pytest.mark.parametrize("environ", [TORCHRUN | {"RANK": "x"}, TORCHRUN | {"RANK": "8"}])
def test_no_place(environ):
    with pytest.raises(DistributedError):
        read_launch_env(environ)


def test_an_address_that_is_missing_is_named(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(DistributedError, match="MASTER_ADDR must be set"):
        init_distributed(LaunchInfo(1, 2), torch.device("cpu"))


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto", LaunchInfo()) == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch sees 0 CUDA devices"):
        pick_device("cuda", LaunchInfo())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device("auto", LaunchInfo(5, 8, 1, 4)) == torch.device("cuda", 1)
    assert pick_device("cuda:3", LaunchInfo()) == torch.device("cuda", 3)
    with pytest.raises(ConfigError, match="each must have one of its own"):
        pick_device("cuda:3", LaunchInfo(0, 2, 0, 2))
    with pytest.raises(ConfigError, match="this is process 4 of 8 on its machine"):
        pick_device("cuda", LaunchInfo(4, 8, 4, 8))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda", LaunchInfo(5, 8, 1, 4)) == torch.device("cuda", 0), "srun shows each task its own alone"


@pytest.mark.parametrize("fast", [True, False])
def test_precision_that_suits_the_device(monkeypatch, caplog, fast):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    cpu = torch.device("cpu")
    assert pick_precision("auto", cpu) == ("bf16" if fast else "fp32")
    assert pick_precision("auto", torch.device("cuda")) == "bf16"
    assert not caplog.records
    assert pick_precision("bf16", cpu) == "bf16"
    assert bool(caplog.records) != fast


@pytest.fixture(autouse=True)
def interrupts():
    """As a terminal sets them; what is started in the background inherits that they are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_are_remembered_and_handlers_come_back():
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert stop.signal is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before
    assert [exit_code(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == [130, REQUEUE, REQUEUE]


def test_a_second_interrupt_acts_at_once():
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_single_process_agrees_with_itself():
    agreement = StopConsensus(DistContext())
    assert [agreement.largest(n) for n in (0, 15, 0)] == [0, 15, 0]
    assert agreement.finish() == 0


@pytest.fixture
def pair():
    """Two processes as their watches see them, with a store of their own."""
    store = torch.distributed.HashStore()
    return [DistContext(rank=rank, size=2, store=store) for rank in range(2)]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(DistContext, "wait", lambda self: None)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_without_signs_of_life_is_named(pair):
    told = []
    with Heartbeat(pair[0], 1.0, told.append):
        other = Heartbeat(pair[1], 1.0)
        other._store.set("name/1", "rank 1 (there, process 7)")
        other._store.set("left/1", "")
        other._store.set("beat/1", "0")
        wait_for(lambda: told)
    assert told == ["rank 1 (there, process 7) died or hangs: no heartbeat for 1 s"]


def test_a_process_that_fails_says_why_and_one_that_is_done_is_missed_by_nobody(pair):
    told = []
    with Heartbeat(pair[0], 1.0, told.append), pytest.raises(ValueError, match="broken"), Heartbeat(pair[1], 1.0):
        raise ValueError("broken")
    with Heartbeat(pair[0], 1.0, told.append):
        wait_for(lambda: told)
    assert "failed: ValueError: broken" in told[0]
    told.clear()
    with Heartbeat(pair[0], 0.5, told.append):
        with Heartbeat(pair[1], 0.5):
            pass
        time.sleep(1.5)
    assert not told


def test_a_clock_that_jumps_kills_nobody(pair, monkeypatch):
    told, clock = [], time.time
    with Heartbeat(pair[0], 1.0, told.append), Heartbeat(pair[1], 1.0, told.append):
        for jump in (1e6, -1e6):
            monkeypatch.setattr(time, "time", lambda jump=jump: clock() + jump)
            time.sleep(1.2)
    assert not told


def test_the_main_thread_learns_who_it_was(pair):
    told = []
    with Heartbeat(pair[0], 1.0, told.append) as watch:
        for key in ("name/1", "left/1", "beat/1"):
            watch._store.set(key, "" if key == "left/1" else "rank 1")
        assert "rank 1 died" in watch.failed_rank()
    assert not told, "who has asked ends the process itself"

"""The processes of a run: started by torchrun or by SLURM's srun, one for each device, or a single one."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

log = logging.getLogger(__name__)

START_TIMEOUT = timedelta(minutes=10)  # for all processes to come up
PORTS = range(20_000, 40_000)  # of which SLURM jobs take one by their number


class DistributedError(RuntimeError):
    """Processes that do not find one another; the message is one line for the user."""


@dataclass(frozen=True)
class LaunchInfo:
    """Where a process stands among the others, as its launcher says.

    Args:
        rank, size: number of this process and of all.
        local_rank, local_size: the same on this machine.
        launcher: "torchrun", "srun" or "" for a process by itself.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = ""


@dataclass(frozen=True)
class DistContext(LaunchInfo):
    """A process among others that it can talk to.

    Args:
        device: of this process.
        store: shared by all; None for a single process.
        control: a group of CPU tensors for the main thread.
        background: one for the thread that writes checkpoints.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: dist.Store | None = None
    control: dist.ProcessGroup | None = None
    background: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes what one process writes."""
        return self.rank == 0

    def sum_(self, tensor: Tensor, wait: bool = True) -> dist.Work | None:
        """Sum a tensor on the device over all processes, in place; without `wait`, what to wait for."""
        if self.size == 1:
            return None
        work = dist.all_reduce(tensor, async_op=True)
        if not wait:
            return work
        work.wait()
        return None

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def close(self) -> None:
        """Leave the others."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def read_launch_env(environ: Mapping[str, str] = os.environ) -> LaunchInfo:
    """Read what torchrun or srun has put into the environment.

    Raises:
        DistributedError: only a part of it is there, or it is no number.
    """
    names = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        # SLURM_STEP_*: a batch script without srun has SLURM_NTASKS too, but is one process.
        "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    }
    for launcher, (rank, size, local_rank, local_size) in names.items():
        if rank not in environ or size not in environ:
            continue
        try:
            number, count = int(environ[rank]), int(environ[size])
            place = LaunchInfo(
                number, count, int(environ.get(local_rank, number)), int(environ.get(local_size, count)), launcher
            )
        except ValueError as error:
            raise DistributedError(f"the environment that {launcher} has made holds no number: {error}") from None
        if not 0 <= number < count:
            raise DistributedError(
                f"{rank} is {number} and {size} is {count}; the first must be at least 0 and smaller"
            )
        return place if count > 1 else LaunchInfo(launcher=launcher)
    return LaunchInfo()


def init_distributed(place: LaunchInfo, device: torch.device) -> DistContext:
    """Find the other processes.

    Raises:
        DistributedError: they are not there, or their address is not known.
    """
    if place.size == 1:
        return DistContext(**vars(place), device=device)
    if place.launcher == "srun":
        _address_of_slurm()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise DistributedError(
            f"{' and '.join(missing)} must say where the process of rank 0 listens; torchrun sets them, and so does "
            "launch/slurm.sh"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=START_TIMEOUT))
        dist.init_process_group(
            backend, store=dist.PrefixStore("fastmum", store), rank=place.rank, world_size=place.size,
            timeout=START_TIMEOUT,
        )  # fmt: skip
        control, background = (dist.new_group(backend="gloo", timeout=START_TIMEOUT) for _ in range(2))
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DistributedError(
            f"process {place.rank} of {place.size} does not find the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({reason})"
        ) from None
    return DistContext(**vars(place), device=device, store=store, control=control, background=background)


def _address_of_slurm() -> None:
    """The first machine of the job, and a port that another job is unlikely to have."""
    environ = os.environ
    if "MASTER_ADDR" not in environ and "SLURM_JOB_NODELIST" in environ:
        try:
            hosts = subprocess.run(
                ["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]],
                capture_output=True, text=True, check=True, timeout=60,
            ).stdout.split()  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            raise DistributedError(
                f"scontrol cannot say which machines this job has ({error}): set MASTER_ADDR"
            ) from None
        environ["MASTER_ADDR"] = hosts[0]
    if "SLURM_JOB_ID" in environ:
        environ.setdefault("MASTER_PORT", str(PORTS[int(environ["SLURM_JOB_ID"]) % len(PORTS)]))

"""Processes of a run, one per device, started by torchrun or srun; and weights sharded over them (FSDP2)."""

import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous

from fastmum.errors import FastmumError

START_TIMEOUT = timedelta(minutes=10)  # for all processes to start
PORTS = range(20_000, 40_000)  # a SLURM job picks one by its id


class DistributedError(FastmumError):
    """The processes of a run cannot connect, or do not fit the configuration."""


@dataclass(frozen=True)
class LaunchInfo:
    """Rank and world size as the launcher put them into the environment; `local_*`: on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = ""  # "torchrun", "srun", or none


@dataclass(frozen=True)
class DistContext(LaunchInfo):
    """Device and communicators of a process; the default is a single process on the CPU."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: dist.Store | None = None  # shared by all ranks; None for a single process
    control: dist.ProcessGroup | None = None  # gloo group for CPU tensors of the main thread
    background: dist.ProcessGroup | None = None  # gloo group for the thread that writes checkpoints

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files."""
        return self.rank == 0

    def sum_(self, tensor: Tensor, wait: bool = True) -> dist.Work | None:
        """All-reduce (sum) a tensor on the device in place; without `wait`, return the pending work."""
        if self.size == 1:
            return None
        work = dist.all_reduce(tensor, async_op=True)
        if not wait:
            return work
        work.wait()
        return None

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def read_launch_env(environ: Mapping[str, str] = os.environ) -> LaunchInfo:
    """Read rank and world size of torchrun or srun; DistributedError if one is not a number, or out of range."""
    names = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        # SLURM_STEP_*: a batch script without srun also has SLURM_NTASKS, but is one process.
        "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    }
    for launcher, (rank, size, local_rank, local_size) in names.items():
        if rank not in environ or size not in environ:
            continue
        try:
            number, count = int(environ[rank]), int(environ[size])
            local = int(environ.get(local_rank, number)), int(environ.get(local_size, count))
        except ValueError as error:
            raise DistributedError(f"an environment variable of {launcher} is not a number: {error}") from None
        if not 0 <= number < count:
            raise DistributedError(f"{rank} is {number}, but must be at least 0 and less than {size}, which is {count}")
        return LaunchInfo(number, count, *local, launcher) if count > 1 else LaunchInfo(launcher=launcher)
    return LaunchInfo()


def init_distributed(launch: LaunchInfo, device: torch.device) -> DistContext:
    """Connect to the other processes; DistributedError if they cannot be reached, or rank 0 has no known address."""
    if launch.size == 1:
        return DistContext(**vars(launch), device=device)
    if launch.launcher == "srun":
        _set_slurm_address()
    if missing := " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ):
        raise DistributedError(f"{missing} must be set to where rank 0 listens; torchrun and launch/slurm.sh set them")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, _, _ = next(rendezvous("env://", launch.rank, launch.size, timeout=START_TIMEOUT))
        dist.init_process_group(
            backend, store=dist.PrefixStore("fastmum", store), rank=launch.rank, world_size=launch.size,
            timeout=START_TIMEOUT,
        )  # fmt: skip
        groups = [dist.new_group(backend="gloo", timeout=START_TIMEOUT) for _ in range(2)]
        control, background = cast(list[dist.ProcessGroup], groups)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        rank = f"rank {launch.rank} of {launch.size}"
        raise DistributedError(f"{rank} cannot connect to the others at {address} ({reason})") from None
    return DistContext(**vars(launch), device=device, store=store, control=control, background=background)


def _set_slurm_address() -> None:
    """Default MASTER_ADDR and MASTER_PORT: the job's first node, and a port that other jobs are unlikely to use."""
    environ = os.environ
    if "MASTER_ADDR" not in environ and "SLURM_JOB_NODELIST" in environ:
        try:
            command = ["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]]
            environ["MASTER_ADDR"] = subprocess.check_output(command, text=True, timeout=60).split()[0]
        except (OSError, subprocess.SubprocessError) as error:
            raise DistributedError(f"scontrol cannot list the nodes of this job ({error}): set MASTER_ADDR") from None
    if "SLURM_JOB_ID" in environ:
        environ.setdefault("MASTER_PORT", str(PORTS[int(environ["SLURM_JOB_ID"]) % len(PORTS)]))


def broadcast_weights(model: nn.Module, world: DistContext) -> None:
    """Copy the parameters and buffers of rank 0 to all ranks."""
    if world.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def shard(
    model: nn.Module, blocks: Iterable[nn.Module], world: DistContext, strategy: str, group_size: int,
    dtype: torch.dtype, reduce_dtype: torch.dtype,
) -> bool:  # fmt: skip
    """Shard the trained weights of all `nn.Linear` in a float32 model, in place; gradients are summed, not averaged.

    Returns whether anything was sharded. DistributedError: `group_size` does not divide the number of devices.

    Args:
        blocks: modules of the model whose matrices are gathered together.
        strategy: "fsdp2", "hsdp", or "ddp", which shards nothing.
        group_size: devices that share one copy of the weights ("hsdp"); 0: the devices of a machine.
        dtype, reduce_dtype: of the gathered matrices, and of the sums of their gradients.
    """
    if strategy == "ddp" or world.size == 1:
        return False
    mesh = _mesh(world, strategy, group_size)
    matrices = {m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for module in (*blocks, model):
        fully_shard(
            module, mesh=mesh, mp_policy=policy, reshard_after_forward=True,
            ignored_params=set(model.parameters()) - matrices,
        )  # fmt: skip
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # not every backend can divide
    return True


def _mesh(world: DistContext, strategy: str, group_size: int) -> DeviceMesh:
    if strategy == "fsdp2":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    size = group_size or world.local_size
    if world.size % size:
        raise DistributedError(f"parallel.shard is {size}, but must divide the number of devices, {world.size}")
    return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))

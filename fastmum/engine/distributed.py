"""Processes of a run, one per device, started by torchrun or srun; and weights sharded over them (FSDP2)."""

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous

from fastmum.errors import FastmumError, first_line, some_names
from fastmum.progress import reported

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
    progress: list[int] = field(default_factory=lambda: [0], compare=False)  # see `advance`

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """This process in messages."""
        return f"rank {self.rank} ({socket.gethostname()}, process {os.getpid()})"

    def advance(self) -> None:
        """Count a batch or another part of the run: a main thread that stops counting is stuck (`Heartbeat`)."""
        self.progress[0] += 1

    def sum_(self, tensor: Tensor, wait: bool = True) -> dist.Work | None:
        """All-reduce (sum) a tensor on the device in place; without `wait`, return the pending work."""
        self.advance()
        if self.size == 1:
            return None
        work = dist.all_reduce(tensor, async_op=True)
        if not wait:
            return work
        work.wait()
        return None

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors on the device by their means over all processes, in one all-reduce."""
        if self.size > 1 and tensors:
            total = torch.cat([x.flatten() for x in tensors])
            self.sum_(total)
            for x, mean in zip(tensors, (total / self.size).split([x.numel() for x in tensors]), strict=True):
                x.copy_(mean.view_as(x))

    def wait(self) -> None:
        self.advance()
        if self.size > 1:
            dist.barrier(group=self.control)

    def work(self, work: Callable[[], None] | None = None) -> None:
        """Do this process's work, and wait for that of the others as long as progress bars advance there."""
        with reported(lambda: self.gather(True)):
            if work:
                work()
        while any(self.gather(False)):
            pass

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks: picklable objects."""
        self.advance()
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def check_same(self, what: str, values: Mapping[str, Any]) -> None:
        """DistributedError on all ranks if these values differ between processes; it names `what`, and the keys."""
        (_, first), *others = self.gather((self.name, dict(values)))
        for name, theirs in others:
            keys = [key for key in {**first, **theirs} if first.get(key) != theirs.get(key)]
            if keys:
                listed = some_names([f"{key} {theirs.get(key)} (rank 0: {first.get(key)})" for key in keys])
                raise DistributedError(f"{name} has other {what} than rank 0: {listed}; they must be the same")

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def read_launch_env(environ: Mapping[str, str] = os.environ) -> LaunchInfo:
    """Read rank and world size of torchrun or srun.

    DistributedError: a variable that is missing while others of its launcher are set, not a number, or out of range.
    """
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    # SLURM_STEP_*: a batch script without srun also has SLURM_NTASKS, but is one process.
    srun = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")
    for launcher, names in {"torchrun": torchrun, "srun": srun}.items():
        if any(name not in environ for name in names[:2]):
            continue
        rank, size = (_number(environ, name) for name in names[:2])
        if not 0 <= rank < size:
            raise DistributedError(f"{names[0]} is {rank}, but must be at least 0 and less than {names[1]} ({size})")
        if size == 1:
            return LaunchInfo(launcher=launcher)
        local = _number(environ, names[2])
        local_size = _number(environ, names[3]) if names[3] else _slurm_local_size(environ, size)
        if not 0 <= local < local_size <= size:
            wrong = f"{names[2]} is {local}, but this machine has {local_size} of {size} processes"
            raise DistributedError(f"{wrong}: check the variables of {launcher}")
        return LaunchInfo(rank, size, local, local_size, launcher)
    for name, other in (torchrun[:2], torchrun[1::-1]):
        if name in environ and environ[name] != ("0" if name == "RANK" else "1"):
            raise DistributedError(f"{name} is {environ[name]}, but {other} is not set: set both, or neither")
    return LaunchInfo()


def _number(environ: Mapping[str, str], name: str) -> int:
    if name not in environ:
        raise DistributedError(f"{name} is not set, but other variables of its launcher are; torchrun and srun set all")
    if not re.fullmatch(r"-?[0-9]{1,18}", environ[name].strip()):  # int() reads 7_1 as 71
        raise DistributedError(f"{name} is '{environ[name]}', but must be a whole number")
    return int(environ[name])


def _slurm_local_size(environ: Mapping[str, str], size: int) -> int:
    """Tasks of a step on this node, from the tasks of every node, such as "8(x2),4"."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name not in environ:
            continue
        if not re.fullmatch(r"\d{1,9}(\(x\d{1,9}\))?(,\d{1,9}(\(x\d{1,9}\))?)*", environ[name]):
            raise DistributedError(f"{name} is '{environ[name]}', but must be like '8(x2),4'")
        groups = [(int(n), int(m or 1)) for n, m in re.findall(r"(\d{1,9})(?:\(x(\d{1,9})\))?", environ[name])]
        if sum(n * m for n, m in groups) == size:  # otherwise they are those of the job, of which this step is a part
            nodes = [tasks for tasks, repeats in groups for _ in range(repeats)]
            node = _number(environ, "SLURM_NODEID") if len(set(nodes)) > 1 else 0
            return nodes[node] if 0 <= node < len(nodes) else 0
    return min(size, _number(environ, "SLURM_NTASKS_PER_NODE")) if "SLURM_NTASKS_PER_NODE" in environ else size


def init_distributed(launch: LaunchInfo, device: torch.device, timeout: timedelta = START_TIMEOUT) -> DistContext:
    """Connect to the other processes; DistributedError if they cannot be reached, or rank 0 has no known address.

    `timeout` is that of collective operations.
    """
    if launch.size == 1:
        return DistContext(**vars(launch), device=device)
    if launch.launcher == "srun":
        _set_slurm_address()
    if missing := " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ):
        raise DistributedError(f"{missing} must be set to where rank 0 listens; torchrun and launch/slurm.sh set them")
    if not 0 < _number(os.environ, "MASTER_PORT") < 2**16:
        raise DistributedError(f"MASTER_PORT is {os.environ['MASTER_PORT']}, but must be between 1 and {2**16 - 1}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, _, _ = next(rendezvous("env://", launch.rank, launch.size, timeout=START_TIMEOUT))
        dist.init_process_group(
            backend, store=dist.PrefixStore("fastmum", store), rank=launch.rank, world_size=launch.size,
            timeout=timeout,
        )  # fmt: skip
        groups = [dist.new_group(backend="gloo", timeout=timeout) for _ in range(2)]
        control, background = cast(list[dist.ProcessGroup], groups)
    except (RuntimeError, ValueError, OSError) as error:
        reason = first_line(error)
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        rank = f"rank {launch.rank} of {launch.size}"
        raise DistributedError(f"{rank} cannot connect to the others at {address} ({reason})") from None
    return DistContext(**vars(launch), device=device, store=store, control=control, background=background)


def _set_slurm_address() -> None:
    """Default MASTER_ADDR and MASTER_PORT: the step's first node, and a port that other jobs are unlikely to use."""
    environ = os.environ
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if "MASTER_ADDR" not in environ and nodes:
        try:
            command = ["scontrol", "show", "hostnames", nodes]
            environ["MASTER_ADDR"] = subprocess.check_output(command, text=True, timeout=60).split()[0]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            raise DistributedError(f"scontrol cannot list the nodes of this job ({error}): set MASTER_ADDR") from None
    if "MASTER_PORT" not in environ and "SLURM_JOB_ID" in environ:
        environ["MASTER_PORT"] = str(PORTS[_number(environ, "SLURM_JOB_ID") % len(PORTS)])


def broadcast_weights(model: nn.Module, world: DistContext) -> None:
    """Copy the parameters and buffers of rank 0 to all ranks."""
    if world.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def shard(
    model: nn.Module, blocks: Iterable[nn.Module], world: DistContext, strategy: str, group_size: int,
    dtype: torch.dtype, reduce_dtype: torch.dtype, exact: Iterable[nn.Module] = (),
) -> bool:  # fmt: skip
    """Shard the trained weights of all `nn.Linear` in a float32 model, in place; gradients are summed, not averaged.

    Returns whether anything was sharded. DistributedError: `group_size` does not divide the number of devices.

    Args:
        blocks: modules of the model whose matrices are gathered together.
        strategy: "fsdp2", "hsdp", or "ddp", which shards nothing.
        group_size: devices that share one copy of the weights ("hsdp"); 0: the devices of a machine.
        dtype, reduce_dtype: of the gathered matrices, and of the sums of their gradients.
        exact: modules whose matrices are gathered in float32, each at once.
    """
    if strategy == "ddp" or world.size == 1:
        return False
    mesh = _mesh(world, strategy, group_size)
    matrices = {m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
    parts = [(module, torch.float32) for module in exact if not matrices.isdisjoint(module.parameters())]
    parts += [(module, dtype) for module in (*blocks, model)]
    for module, param_dtype in parts:
        fully_shard(
            module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False),
            reshard_after_forward=True,
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
    if not group_size and len(sizes := {*world.gather(size)}) > 1:
        counts = " and ".join(map(str, sorted(sizes)))
        raise DistributedError(f"parallel.shard is 0 (the processes of a machine), but machines have {counts}: set it")
    if world.size % size:
        raise DistributedError(f"parallel.shard is {size}, but must divide the number of devices, {world.size}")
    return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))

"""Weights shared out over devices (FSDP2): the matrices of the model; vectors, 0.3 % of it, stay whole on every device.

fsdp2: a device keeps 1/N of every matrix, of its moments and of its gradient; what a block needs is gathered before it
runs. hsdp: so within groups of devices, and the groups have copies of one another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fastmum.engine.distributed import DistContext, DistributedError


def make_same(model: nn.Module, world: DistContext) -> None:
    """Give every process the weights and buffers of the first."""
    if world.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    world: DistContext,
    strategy: str,
    group_size: int,
    dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> bool:
    """Share the matrices of a model out, in place; their gradients are summed over devices, not averaged.

    Args:
        model: in float32, the same on every process.
        blocks: modules whose matrices are gathered one after another.
        world: of the processes.
        strategy: "fsdp2", "hsdp", or "ddp", which shares nothing out.
        group_size: of "hsdp", devices with one copy of the weights; 0: those of a machine.
        dtype: that gathered matrices have.
        reduce_dtype: that their gradients are summed in.

    Raises:
        DistributedError: groups that the processes cannot form.
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
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # dividing by 1 is not for every backend
    return True


def _mesh(world: DistContext, strategy: str, group_size: int) -> DeviceMesh:
    if strategy == "fsdp2":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    size = group_size or world.local_size
    if world.size % size:
        raise DistributedError(f"parallel.shard is {size}, but must divide the number of devices, {world.size}")
    shape = world.size // size, size
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))

"""Weights sharded over devices (FSDP2): the matrices of the model; vectors, 0.3 % of it, are replicated.

fsdp2: each device holds 1/N of every matrix, its gradient and its moments; a block's matrices are gathered before it
runs. hsdp: sharded within groups of devices, replicated over groups.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fastmum.engine.distributed import DistContext, DistributedError


def broadcast_weights(model: nn.Module, world: DistContext) -> None:
    """Copy the parameters and buffers of rank 0 to all ranks."""
    if world.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    world: DistContext,
    strategy: str,
    group_size: int,
    dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> bool:
    """Shard the trained weights of all `nn.Linear` in a model, in place; gradients are summed, not averaged.

    Args:
        model: float32, equal on all ranks.
        blocks: modules of the model whose matrices are gathered together.
        strategy: "fsdp2", "hsdp", or "ddp", which shards nothing.
        group_size: devices that share one copy of the weights ("hsdp"); 0: the devices of a machine.
        dtype: of the gathered matrices.
        reduce_dtype: in which their gradients are summed.

    Returns:
        Whether anything was sharded.

    Raises:
        DistributedError: `group_size` does not divide the number of devices.
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

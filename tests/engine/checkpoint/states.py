"""States to save and load, and process groups that do it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from processes import SIZE
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fastmum.engine.checkpoint import CheckpointError, Checkpoints, load_newest

TIMEOUT = 60  # seconds for a job
CONFIG = {"depth": 2, "embed_dim": 32}
VALUES = {"model_config": CONFIG, "frames_per_step": 96}
PLACEMENTS = {"fsdp2": [Shard(0)], "hsdp": [Replicate(), Shard(0)]}
# Rows that two and four ranks divide, rows that they do not divide, and fewer rows than ranks.
SHAPES = {"even.weight": (8, 6), "uneven.weight": (7, 5), "token": (1, 1, 6), "conv.weight": (8, 3, 4, 4), "bias": (3,)}


class Ranks(NamedTuple):
    """The process group of a job, and meshes by strategy."""

    group: Any
    meshes: dict[str, DeviceMesh]


def join(rank, store):
    """Connect a process of the pool; returns its `Ranks` by size."""
    timeout = timedelta(seconds=TIMEOUT / 2)
    dist.init_process_group("gloo", store=dist.FileStore(store, SIZE), rank=rank, world_size=SIZE, timeout=timeout)
    ranks = {size: Ranks(dist.new_group(list(range(size)), backend="gloo"), {}) for size in (1, 2, 4)}
    for size in (2, 4):  # every process takes part in making every mesh
        ranks[size].meshes["fsdp2"] = DeviceMesh("cpu", torch.arange(size))
        ranks[size].meshes["hsdp"] = DeviceMesh("cpu", torch.arange(size).view(2, size // 2))
    return ranks


def full_state(seed):
    """Plain tensors, different for every seed; the convolution's are channels last."""
    random = torch.Generator().manual_seed(seed)
    state = {
        f"{kind}.{name}": torch.randn(shape, generator=random)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for name, shape in SHAPES.items()
    }
    for name in (name for name in state if name.endswith("conv.weight")):
        state[name] = state[name].to(memory_format=torch.channels_last)
    state["optimizer.step"] = torch.tensor(float(seed))
    state["meter.losses"] = torch.randn(25, generator=random, dtype=torch.float64)
    return state


def placed_state(ranks, strategy, seed):
    """`full_state`, with weights and moments sharded by a strategy other than "ddp"."""
    return {
        name: tensor
        if strategy == "ddp" or name.startswith(("optimizer.", "meter."))
        else distribute_tensor(tensor, ranks.meshes[strategy], PLACEMENTS[strategy])
        for name, tensor in full_state(seed).items()
    }


def save(ranks, folder, strategy, seed, step):
    writer = Checkpoints(folder, keep=3, group=ranks.group)
    writer.save(step, placed_state(ranks, strategy, seed), VALUES)
    writer.close()


def load(ranks, folder, strategy):
    """Load the newest checkpoint over other values; returns its step and the whole tensors."""
    state = placed_state(ranks, strategy, seed=99)
    before = dict(state)
    with pytest.raises(CheckpointError, match=r"depth 2 \(configured: 9\)"):
        load_newest(folder, state, {**CONFIG, "depth": 9}, ranks.group)
    manifest = load_newest(folder, state, CONFIG, ranks.group)
    assert all(state[name] is tensor for name, tensor in before.items())
    return manifest.step, {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


def assert_same(state, seed):
    torch.testing.assert_close(state, full_state(seed), rtol=0, atol=0)


def assert_newest(path, seed):
    """The newest checkpoint holds `full_state`; returns its manifest."""
    state = full_state(99)
    manifest = load_newest(path, state, CONFIG)
    assert_same(state, seed)
    return manifest

"""States to save and load, and what the processes of a team do with them."""

from __future__ import annotations

from pathlib import Path

import torch
from team import Processes
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fastmum.engine.checkpoint import Checkpoints, load_newest

CONFIG = {"depth": 2, "embed_dim": 32}
ABOUT = {"model_config": CONFIG, "frames_per_step": 96}
PLACEMENTS = {"fsdp2": [Shard(0)], "hsdp": [Replicate(), Shard(0)]}
# Rows that two and four ranks divide, do not divide, and that are fewer than ranks.
SHAPES = {"even.weight": (8, 6), "uneven.weight": (7, 5), "token": (1, 1, 6), "conv.weight": (8, 3, 4, 4), "bias": (3,)}


def full_state(seed: int) -> dict[str, Tensor]:
    """Plain tensors, other ones for every seed; the convolution's lie in memory channels last."""
    random = torch.Generator().manual_seed(seed)
    state = {
        f"{kind}.{name}": torch.randn(shape, generator=random)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for name, shape in SHAPES.items()
    }
    for name in state:
        if name.endswith("conv.weight"):
            state[name] = state[name].to(memory_format=torch.channels_last)
    state["optimizer.step"] = torch.tensor(float(seed))
    state["meter.losses"] = torch.randn(25, generator=random, dtype=torch.float64)
    return state


def placed_state(team: Processes, strategy: str, seed: int) -> dict[str, Tensor]:
    """The same as `full_state`, weights and moments sharded by a strategy; "ddp": by none."""
    state = full_state(seed)
    if strategy == "ddp":
        return state
    return {
        name: tensor
        if name.startswith(("optimizer.", "meter."))
        else distribute_tensor(tensor, team.meshes[strategy], PLACEMENTS[strategy])
        for name, tensor in state.items()
    }


def save(team: Processes, folder: Path, strategy: str, seed: int, step: int) -> None:
    """Write a checkpoint."""
    writer = Checkpoints(folder, keep=3, group=team.group)
    writer.save(step, placed_state(team, strategy, seed), ABOUT)
    writer.close()


def load(team: Processes, folder: Path, strategy: str) -> tuple[int, dict[str, Tensor]]:
    """Load the newest checkpoint over other values; its step and the whole tensors."""
    state = placed_state(team, strategy, seed=99)
    before = dict(state)
    about = load_newest(folder, state, CONFIG, team.group)
    assert all(state[name] is tensor for name, tensor in before.items())
    return about.step, {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}

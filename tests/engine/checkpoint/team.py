"""Processes that talk over gloo, for all tests of checkpoints that want some."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from processes import SIZE, Pool

PATIENCE = 60  # seconds that a job may take


class Processes(NamedTuple):
    """What takes part in a job: a group, and meshes by the name of a way to shard."""

    group: Any
    meshes: dict[str, Any]


class Team(Pool):
    """Jobs are given their `Processes`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(PATIENCE, _join, str(folder / "store"))


def _join(rank: int, store: str) -> dict[int, Processes]:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    dist.init_process_group(
        "gloo", store=dist.FileStore(store, SIZE), rank=rank, world_size=SIZE, timeout=timedelta(seconds=PATIENCE / 2)
    )
    teams = {size: Processes(dist.new_group(list(range(size)), backend="gloo"), {}) for size in (1, 2, 4)}
    for size in (2, 4):  # every process takes part in making every mesh
        teams[size].meshes["fsdp2"] = DeviceMesh("cpu", torch.arange(size))
        teams[size].meshes["hsdp"] = DeviceMesh("cpu", torch.arange(size).view(2, size // 2))
    return teams

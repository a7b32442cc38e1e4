"""Processes that talk over gloo, started once and used by many tests: importing torch takes seconds."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

SIZE = 4
PATIENCE = 60  # seconds that a job may take

# Processes are forked from one that has imported everything, and has no threads yet.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["fastmum.training.checkpoint"])


class Processes(NamedTuple):
    """What takes part in a job: a group, and meshes by the name of a way to shard."""

    group: Any
    meshes: dict[str, Any]


class Failure(str):
    """Traceback of an exception."""


class Team:
    """Four processes, of which the first 1, 2 or 4 do what a test wants."""

    def __init__(self, folder: Path) -> None:
        self._pipes, self._processes = [], []
        for rank in range(SIZE):
            ours, theirs = FORKSERVER.Pipe()
            process = FORKSERVER.Process(target=_work, args=(rank, str(folder / "store"), theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(team, *args)` in the first `size` processes; what each returned."""
        for pipe in self._pipes[:size]:
            pipe.send((size, function, args))
        outcomes = []
        for rank, pipe in enumerate(self._pipes[:size]):
            assert pipe.poll(PATIENCE), f"rank {rank} hangs"
            outcomes.append(pipe.recv())
        for rank, outcome in enumerate(outcomes):
            assert not isinstance(outcome, Failure), f"rank {rank}: {outcome}"
        return outcomes

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _work(rank: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, SIZE), rank=rank, world_size=SIZE, timeout=timedelta(seconds=PATIENCE / 2)
    )
    teams = {size: Processes(dist.new_group(list(range(size)), backend="gloo"), {}) for size in (1, 2, 4)}
    for size in (2, 4):  # every process takes part in making every mesh
        teams[size].meshes["fsdp2"] = DeviceMesh("cpu", torch.arange(size))
        teams[size].meshes["hsdp"] = DeviceMesh("cpu", torch.arange(size).view(2, size // 2))
    pipe.send("ready")
    while True:
        size, function, args = pipe.recv()
        try:
            pipe.send(function(teams[size], *args))
        except BaseException:
            pipe.send(Failure(traceback.format_exc()))

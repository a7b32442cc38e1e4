"""A pool of processes that are started once for many tests, because importing torch takes seconds."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

SIZE = 4

# Forks of a server that has imported everything and has no threads.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["fastmum.train"])


def wait_for(condition: Callable[[], Any], what: str = "it", seconds: float = 90) -> None:
    """Fail if the condition is not true within this time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


class Failure(str):
    """Traceback of an exception."""


class Pool:
    """Four processes; a test uses the first 1, 2 or 4.

    Args:
        timeout: seconds for a job.
        prepare: called in each process with its rank and `args`; returns the first argument of jobs by their size.
    """

    def __init__(self, timeout: float, prepare: Callable[..., Mapping[int, Any]], *args: Any) -> None:
        self._timeout, self._pipes, self._processes = timeout, [], []
        for rank in range(SIZE):
            ours, theirs = FORKSERVER.Pipe()
            process = FORKSERVER.Process(target=_work, args=(theirs, prepare, rank, *args), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of `function(prepared, *args)` in the first `size` processes."""
        for pipe in self._pipes[:size]:
            pipe.send((size, function, args))
        outcomes = []
        for rank, pipe in enumerate(self._pipes[:size]):
            assert pipe.poll(self._timeout), f"rank {rank} hangs"
            outcomes.append(pipe.recv())
        for rank, outcome in enumerate(outcomes):
            assert not isinstance(outcome, Failure), f"rank {rank}: {outcome}"
        return outcomes

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _work(pipe: Connection, prepare: Callable[..., Mapping[int, Any]], rank: int, *args: Any) -> None:
    import torch

    torch.set_num_threads(1)
    prepared = prepare(rank, *args)
    while True:
        size, function, args = pipe.recv()
        try:
            pipe.send(function(prepared[size], *args))
        except BaseException:
            pipe.send(Failure(traceback.format_exc()))

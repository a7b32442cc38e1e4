"""A pool of processes that are started once for many tests, because importing torch takes seconds."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from typing import Any

SIZE = 4

# Forks of a server that has imported everything and has no threads.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["fastmum.train"])

_prepared: Mapping[int, Any] = {}


def wait_for(condition: Callable[[], Any], what: str = "it", seconds: float = 90) -> None:
    """Fail if the condition is not true within this time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


class Pool:
    """Four processes; a test uses the first ones.

    Args:
        timeout: seconds for a job.
        prepare: called in each process with its rank and `args`; returns the first argument of jobs by their size.
    """

    def __init__(self, timeout: float, prepare: Callable[..., Mapping[int, Any]], *args: Any) -> None:
        self._timeout = timeout
        self._processes = [FORKSERVER.Pool(1, _prepare, (prepare, rank, *args)) for rank in range(SIZE)]

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of `function(prepared, *args)` in the first `size` processes; raises their errors."""
        results = [process.apply_async(_call, (size, function, args)) for process in self._processes[:size]]
        return [result.get(self._timeout) for result in results]

    def close(self) -> None:
        for process in self._processes:
            process.terminate()


def _prepare(prepare: Callable[..., Mapping[int, Any]], *args: Any) -> None:
    import torch

    global _prepared
    torch.set_num_threads(1)
    _prepared = prepare(*args)


def _call(size: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(_prepared[size], *args)

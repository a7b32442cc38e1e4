"""Work of commands on data: independent tasks in processes, their results in order."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NoReturn, TypeVar

from fastmum.data.errors import DataError
from fastmum.errors import run_command

T = TypeVar("T")
R = TypeVar("R")

PREFETCH = 4  # tasks submitted per worker: bounds the memory, keeps every worker busy


def map_in_order(
    work: Callable[[T], R], tasks: Sequence[T], workers: int, begin: Callable[[], None] | None = None
) -> Iterator[R]:
    """Results of the tasks, which are picklable, in their order; `begin` is called in each process first.

    0 or 1 `workers` work in this process. DataError: a process was killed.
    """
    if workers <= 1 or len(tasks) <= 1:
        yield from map(work, tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), spawn, _init_worker, (begin,))
    try:
        pending: deque = deque()
        for task in tasks:
            pending.append(pool.submit(work, task))
            if len(pending) >= PREFETCH * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError("a reading process was killed, perhaps for lack of memory; try fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _init_worker(begin: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if begin is not None:
        begin()


def _exit_with_parent() -> None:
    # If the parent is killed, a worker would wait forever for its next part.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def until_terminated(command: Callable[[], int | None], left: str) -> int:
    """`run_command`, which cleans up after SIGTERM, too; `left` says what is there after an interruption."""

    def terminate(number: int, _: object) -> NoReturn:
        print(f"terminated; {left}", file=sys.stderr)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, terminate)  # batch systems send it
    try:
        return run_command(command, interrupted=f"interrupted; {left}")
    finally:
        signal.signal(signal.SIGTERM, before)

"""Noticing that a process has died: each gives a sign of life to a common store, and looks for those of the others.

A process that is gone leaves the others waiting in a collective operation for as long as its timeout says. Here they
stop as soon as its signs are missing, and say which one it was, where it ran and why it left, if it could tell.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from fastmum.engine.distributed import DistContext

log = logging.getLogger(__name__)

BEATS = 10  # signs of life within the time after which a process counts as dead
STORE_TIMEOUT = timedelta(seconds=20)
LEFT_WELL = "done"
STORE = "rank 0, or the launcher that holds the common store,"


def is_of_processes(error: RuntimeError) -> bool:
    """Whether an operation of several processes has failed, as it does when one of them is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)  # gloo's own errors have no class, but its paths


class Heartbeat:
    """Signs of life, by threads of its own; while entered.

    Only monotonic clocks and counts are compared, so that a jump of a machine's clock kills nobody. A process that was
    stopped for a while and goes on sees that the others have gone on too.

    Args:
        world: of the processes; a single one is not watched.
        dead_after: seconds without a sign of life.
        stop: called with one line when another process has died; by default it is logged, and this process ends.
    """

    def __init__(self, world: DistContext, dead_after: float, stop: Callable[[str], None] | None = None) -> None:
        self._world, self._dead_after = world, dead_after
        self._stop = stop or _end_process
        self._store = dist.PrefixStore("watch", world.store) if world.store is not None else None
        self._over = threading.Event()
        self._found, self._handled = threading.Event(), threading.Event()
        self._dead: str | None = None
        self._answers = 0  # of the store
        self._threads = [
            threading.Thread(target=run, name="watch", daemon=True) for run in (self._run, self._run_store)
        ]

    def __enter__(self) -> Heartbeat:
        if self._store is not None:
            self._store.set_timeout(STORE_TIMEOUT)
            rank = self._world.rank
            self._store.set(f"name/{rank}", f"rank {rank} ({socket.gethostname()}, process {os.getpid()})")
            self._store.set(f"left/{rank}", "")
            self._store.set(f"beat/{rank}", "0")
            self._store.set("dead", "")  # before anyone can be missed: all wait for all below
            self._world.wait()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self._store is None:
            return
        self._over.set()
        self._handled.set()
        for thread in self._threads:
            thread.join(self._dead_after)  # it may wait for a store that never answers
        if self._dead is None:  # else the others know, or the store is gone
            self.leave(LEFT_WELL if error is None else f"{kind.__name__}: {str(error).partition(chr(10))[0]}")

    def leave(self, reason: str) -> None:
        """Tell the others why this process ends."""
        try:
            self._store.set(f"left/{self._world.rank}", reason)
        except RuntimeError as error:
            log.debug("the store is gone: %s", error)

    def culprit(self) -> str | None:
        """Which process has died, as far as can be found out within the time that it takes; None: none.

        For a process whose collective operation has failed: that the other is gone is known before who it was.
        """
        if self._store is None:
            return None
        self._handled.set()
        self._found.wait(2 * self._dead_after)
        return self._dead

    def _run(self) -> None:
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        count, seen = 0, {rank: ("", time.monotonic()) for rank in others}
        failing_since: float | None = None
        while not self._over.wait(self._dead_after / BEATS):
            count += 1
            try:
                self._store.set(f"beat/{self._world.rank}", str(count))
                beats = self._store.multi_get([f"beat/{rank}" for rank in others])
                *reasons, dead = self._store.multi_get([*(f"left/{rank}" for rank in others), "dead"])
            except RuntimeError as error:
                now = time.monotonic()
                failing_since = failing_since or now
                if now - failing_since > self._dead_after / 2:
                    self._report(f"{STORE} cannot be reached ({str(error).partition(chr(10))[0]})")
                    return
                continue
            failing_since, now = None, time.monotonic()
            self._answers += 1
            if dead:  # another process has found it out
                self._report(dead.decode())
                return
            for rank, beat, reason in zip(others, beats, reasons, strict=True):
                reason = reason.decode()
                if reason == LEFT_WELL:
                    continue
                if beat != seen[rank][0]:
                    seen[rank] = beat, now
                if reason or now - seen[rank][1] > self._dead_after:
                    name = self._store.get(f"name/{rank}").decode()
                    self._report(
                        f"{name} {'has stopped: ' + reason if reason else 'has died or hangs: ' + self._silence()}",
                        tell=True,
                    )
                    return

    def _run_store(self) -> None:
        """Reading from a store whose process is stopped has no time limit."""
        answers, silent = 0, 0
        while not self._over.wait(self._dead_after / BEATS):  # counted, so that a time asleep is nobody's silence
            answers, silent = self._answers, silent + 1 if answers == self._answers else 0
            if silent > BEATS:
                self._report(f"{STORE} does not answer: {self._silence()}")
                return

    def _silence(self) -> str:
        return f"no sign of life for {self._dead_after:g} s"

    def _report(self, dead: str, tell: bool = False) -> None:
        if tell:
            # The store may end with this process: all are to read it first.
            with contextlib.suppress(RuntimeError):
                self._store.set("dead", dead)
            self._over.wait(2 * self._dead_after / BEATS)
        self._dead = dead
        self._found.set()
        # The main thread may have seen its collective operation fail, and is about to say so itself.
        if not self._handled.wait(self._dead_after / BEATS):
            self._stop(dead)


def _end_process(dead: str) -> None:
    print(f"error: {dead}; this process ends too, and the run goes on from its last checkpoint", flush=True)
    os._exit(2)

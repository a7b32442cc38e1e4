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

from fastmum.parallel.world import World

log = logging.getLogger(__name__)

BEATS = 10  # signs of life within the time after which a process counts as dead
STORE_TIMEOUT = timedelta(seconds=20)
LEFT_WELL = "done"


class Watch:
    """Signs of life, as a thread of its own; while entered.

    Only monotonic clocks and counts are compared, so that a jump of a machine's clock kills nobody. A process that was
    stopped for a while and goes on sees that the others have gone on too.

    Args:
        world: of the processes; a single one is not watched.
        dead_after: seconds without a sign of life.
        stop: called with one line when another process has died; by default it is logged, and this process ends.
    """

    def __init__(self, world: World, dead_after: float, stop: Callable[[str], None] | None = None) -> None:
        self._world, self._dead_after = world, dead_after
        self._stop = stop or _end_process
        self._store = dist.PrefixStore("watch", world.store) if world.store is not None else None
        self._over = threading.Event()
        self._found, self._handled = threading.Event(), threading.Event()
        self._dead: str | None = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        if self._store is not None:
            self._store.set_timeout(STORE_TIMEOUT)
            rank = self._world.rank
            self._store.set(f"name/{rank}", f"rank {rank} ({socket.gethostname()}, process {os.getpid()})")
            self._store.set(f"left/{rank}", "")
            self._store.set(f"beat/{rank}", "0")
            self._store.set("dead", "")  # before anyone can be missed: all wait for all below
            self._world.wait()
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self._store is None:
            return
        self._over.set()
        self._handled.set()
        self._thread.join()
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
                    self._report("rank 0, or the launcher that holds the common store, cannot be reached "
                                 f"({str(error).partition(chr(10))[0]})")  # fmt: skip
                    return
                continue
            failing_since, now = None, time.monotonic()
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
                    self._report(f"{name} {'has stopped: ' + reason if reason else self._silence()}", tell=True)
                    return

    def _silence(self) -> str:
        return f"has died or hangs: no sign of life for {self._dead_after:g} s"

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

"""Detects dead or hanging ranks: every rank writes a heartbeat to the shared store and checks those of the others.

Without it, a collective operation waits for a dead rank for minutes. With it the other ranks exit within seconds and
report which rank failed, its host and process, and its error where it could still write one.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Self

import torch.distributed as dist

from fastmum.engine.distributed import DistContext
from fastmum.errors import FastmumError

log = logging.getLogger(__name__)

BEATS = 10  # heartbeats within the time after which a rank counts as dead
STORE_TIMEOUT = timedelta(seconds=20)
DONE = "done"  # reason of a rank that finished
STORE = "rank 0, or the launcher that holds the shared store,"


class PeerError(FastmumError):
    """Another process has died; the message says which."""


class Heartbeat:
    """Context manager that sends heartbeats and checks those of the other ranks, in two threads.

    It compares counts and monotonic clocks only: setting a clock or suspending this process kills no run. A collective
    operation that fails inside the block because a rank failed raises `PeerError`.

    Args:
        dead_after: seconds without a heartbeat after which a rank counts as dead.
        stop: called with one line after another rank failed; by default it is printed and this process exits with 2.
    """

    def __init__(self, world: DistContext, dead_after: float, stop: Callable[[str], None] | None = None) -> None:
        assert world.store is not None
        self._world, self._dead_after, self._interval = world, dead_after, dead_after / BEATS
        self._stop, self._silence = stop or _exit, f"no heartbeat for {dead_after:g} s"
        self._store = dist.PrefixStore("watch", world.store)
        self._closed, self._found, self._handled = threading.Event(), threading.Event(), threading.Event()
        self._failed: str | None = None
        self._answers = 0  # of the store

    def __enter__(self) -> Self:
        store, rank = self._store, self._world.rank
        store.set_timeout(STORE_TIMEOUT)
        name = f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"
        for key, value in {f"name/{rank}": name, f"left/{rank}": "", f"beat/{rank}": "0", "dead": ""}.items():
            store.set(key, value)
        self._world.wait()  # all keys exist before any rank reads them
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._watch_ranks, self._watch_store)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        # gloo raises RuntimeError with its source path.
        collective = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        failed = None
        self._handled.set()
        if collective and not isinstance(error, FastmumError):
            self._found.wait(2 * self._dead_after)  # the error arrives before the missing heartbeat is detected
            failed = self._failed
        self._closed.set()
        for thread in self._threads:
            thread.join(self._dead_after)  # it may wait for a store that never answers
        if self._failed is None:  # otherwise the others know, or the store is gone
            reason = DONE if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
            try:
                self._store.set(f"left/{self._world.rank}", reason)
            except RuntimeError as lost:
                log.debug("the store is gone: %s", lost)
        if failed:
            raise PeerError(f"{failed}; the run continues from its last checkpoint") from error

    def _watch_ranks(self) -> None:
        store, rank = self._store, self._world.rank
        others = [other for other in range(self._world.size) if other != rank]
        count, seen = 0, {other: (b"", time.monotonic()) for other in others}
        failing_since: float | None = None
        while not self._closed.wait(self._interval):
            count += 1
            try:
                store.set(f"beat/{rank}", str(count))
                beats = store.multi_get([f"beat/{other}" for other in others])
                *reasons, dead = store.multi_get([*(f"left/{other}" for other in others), "dead"])
            except RuntimeError as error:
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > self._dead_after / 2:
                    return self._report(f"{STORE} cannot be reached ({str(error).partition(chr(10))[0]})")
                continue
            failing_since, now = None, time.monotonic()
            self._answers += 1
            if dead:  # another rank detected it
                return self._report(dead.decode())
            for other, beat, reason in zip(others, beats, reasons, strict=True):
                if reason.decode() == DONE:
                    continue
                if beat != seen[other][0]:
                    seen[other] = beat, now
                if reason or now - seen[other][1] > self._dead_after:
                    why = f"failed: {reason.decode()}" if reason else f"died or hangs: {self._silence}"
                    failed = f"{store.get(f'name/{other}').decode()} {why}"
                    with contextlib.suppress(RuntimeError):
                        store.set("dead", failed)
                    self._closed.wait(2 * self._interval)  # the store may end with this process: all read it first
                    return self._report(failed)

    def _watch_store(self) -> None:
        """Detect a store that does not answer: reads from a suspended process have no timeout."""
        answers, silent = 0, 0
        while not self._closed.wait(self._interval):  # counts intervals: this process may have been suspended
            answers, silent = self._answers, silent + 1 if answers == self._answers else 0
            if silent > BEATS:
                return self._report(f"{STORE} does not answer: {self._silence}")

    def _report(self, failed: str) -> None:
        self._failed = failed
        self._found.set()
        # The main thread may have caught the error of its collective operation and report the failure itself.
        if not self._handled.wait(self._interval):
            self._stop(failed)


def _exit(failed: str) -> None:
    print(f"error: {failed}; this process exits too, and the run resumes from its last checkpoint", flush=True)
    os._exit(2)

"""Detects dead or stuck ranks: every rank writes a heartbeat to the shared store and checks those of the others.

Without it, a collective operation waits for a dead rank for minutes. With it the other ranks exit within seconds and
report which rank failed, its host and process, and its error where it could still write one. A heartbeat also holds
the progress of the main thread (`DistContext.advance`), which may be stuck while the process lives.
"""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch.distributed as dist

from fastmum.engine.distributed import DistContext
from fastmum.engine.stop import REQUEUE, Stopped
from fastmum.errors import FastmumError, first_line

log = logging.getLogger(__name__)

BEATS = 10  # heartbeats within the time after which a rank counts as dead
STORE_TIMEOUT = timedelta(seconds=20)
DONE, STOPPED = "done", "was stopped by "  # reasons of a rank that finished, or was stopped by a signal
STORE = "rank 0, or the launcher that holds the shared store,"


class PeerError(FastmumError):
    """Another process has ended or is stuck; the message says which. `code` is the exit code of this process."""

    def __init__(self, failed: str, code: int = 2) -> None:
        super().__init__(failed)
        self.code = code


@dataclass
class _Seen:
    """A rank's last beat and progress, and the intervals since they changed."""

    beat: bytes = b""
    progress: int = 0
    silent: int = 0
    still: int = 0

    def update(self, beat: bytes) -> None:
        progress = int(beat.split()[1])
        self.silent = self.silent + 1 if beat == self.beat else 0
        self.still = self.still + 1 if progress == self.progress else 0
        self.beat, self.progress = beat, progress


class Heartbeat:
    """Context manager that sends heartbeats and checks those of the other ranks, in two threads.

    It counts intervals of its own thread: setting a clock or suspending processes kills no run. A collective operation
    that fails inside the block because a rank failed raises `PeerError`.

    Args:
        dead_after: seconds without a heartbeat after which a rank counts as dead.
        stuck_after: seconds without progress after which the rank that is furthest behind counts as stuck.
        stop: called after another rank failed; by default the error is printed and this process exits with its code.
    """

    def __init__(
        self, world: DistContext, dead_after: float, stuck_after: float, stop: Callable[[PeerError], None] | None = None
    ) -> None:
        assert world.store is not None
        self._world, self._dead_after, self._interval = world, dead_after, dead_after / BEATS
        self._stuck_after, self._stop = stuck_after, stop or _exit
        self._silence = f"no heartbeat for {dead_after:g} s"
        self._store = dist.PrefixStore("watch", world.store)
        self._closed, self._found, self._handled = threading.Event(), threading.Event(), threading.Event()
        self._failed: PeerError | None = None
        self._answers = 0  # of the store

    def __enter__(self) -> Self:
        store, rank = self._store, self._world.rank
        store.set_timeout(STORE_TIMEOUT)
        name = self._world.name
        for key, value in {f"name/{rank}": name, f"left/{rank}": "", f"beat/{rank}": "0 0", "dead": ""}.items():
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
        if error and collective and not isinstance(error, FastmumError):
            self._found.wait(2 * self._dead_after)  # the error arrives before the missing heartbeat is detected
            lost = f"{self._world.name} lost the connection to the others ({first_line(error)})"
            failed = self._failed or PeerError(lost)
        self._closed.set()
        for thread in self._threads:
            thread.join(self._dead_after)  # it may wait for a store that never answers
        if self._failed is None:  # otherwise the others know, or the store is gone
            reason = f"{type(error).__name__}: {first_line(error)}" if error else DONE
            if isinstance(error, Stopped):
                reason = STOPPED + error.name
            try:
                self._store.set(f"left/{self._world.rank}", reason)
            except RuntimeError as lost:
                log.debug("the store is gone: %s", lost)
        if failed:
            raise PeerError(f"{failed}; the run continues from its last checkpoint", failed.code) from error

    def _watch_ranks(self) -> None:
        store, rank, size = self._store, self._world.rank, self._world.size
        seen = [_Seen() for _ in range(size)]
        count, failures = 0, 0
        while not self._closed.wait(self._interval):
            count += 1
            try:
                store.set(f"beat/{rank}", f"{count} {self._world.progress[0]}")
                beats = store.multi_get([f"beat/{other}" for other in range(size)])
                *left, dead = store.multi_get([*(f"left/{other}" for other in range(size)), "dead"])
            except RuntimeError as error:
                failures += 1
                if failures > BEATS / 2:
                    return self._report(PeerError(f"{STORE} cannot be reached ({first_line(error)})"))
                continue
            failures = 0
            self._answers += 1
            if dead:  # another rank detected it
                code, _, failed = dead.decode().partition(" ")
                return self._report(PeerError(failed, int(code)))
            for each, beat in zip(seen, beats, strict=True):
                each.update(beat)
            if found := self._failure([reason.decode() for reason in left], seen):
                other, why, number = found
                failed = f"{store.get(f'name/{other}').decode()} {why}"
                with contextlib.suppress(RuntimeError):
                    store.set("dead", f"{number} {failed}")
                self._closed.wait(2 * self._interval)  # the store may end with this process: all read it first
                return self._report(PeerError(failed, number))

    def _failure(self, reasons: list[str], seen: list[_Seen]) -> tuple[int, str, int] | None:
        """A rank that ended, died or is stuck, what happened to it, and the exit code for the others."""
        running = [rank for rank, reason in enumerate(reasons) if reason != DONE]
        for rank in running:
            if reasons[rank].startswith(STOPPED):
                return rank, reasons[rank], REQUEUE
            if reasons[rank]:
                return rank, f"failed: {reasons[rank]}", 2
            if seen[rank].silent > BEATS and rank != self._world.rank:
                return rank, f"died or hangs: {self._silence}", 2
        last = min(running, key=lambda rank: seen[rank].progress)
        if seen[last].still * self._interval <= self._stuck_after:
            return None
        alike = sum(seen[rank].progress == seen[last].progress for rank in running) - 1
        others = f", like {alike} more" if alike else ""
        return last, f"is stuck{others}: no progress for {self._stuck_after:g} s (parallel.stuck_after_s)", 2

    def _watch_store(self) -> None:
        """Detect a store that does not answer: reads from a suspended process have no timeout."""
        answers, silent = 0, 0
        while not self._closed.wait(self._interval):  # counts intervals: this process may have been suspended
            answers, silent = self._answers, silent + 1 if answers == self._answers else 0
            if silent > BEATS:
                return self._report(PeerError(f"{STORE} does not answer: {self._silence}"))

    def _report(self, failed: PeerError) -> None:
        self._failed = failed
        self._found.set()
        # The main thread may have caught the error of its collective operation and report the failure itself.
        if not self._handled.wait(self._interval):
            self._stop(failed)


def _exit(failed: PeerError) -> None:
    message = f"error: {failed}; this process exits too, and the run resumes from its last checkpoint"
    print(message, file=sys.stderr, flush=True)
    os._exit(failed.code)

"""Checkpoints written while training goes on, each in a folder of its own that appears when it is whole."""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastmum.engine.checkpoint.about import About, State, TensorAbout
from fastmum.engine.checkpoint.errors import CheckpointError, reason
from fastmum.engine.checkpoint.files import FileAbout, sync_folder
from fastmum.engine.checkpoint.folder import PARTIAL, find_checkpoints, free_name, prune, remove_partial
from fastmum.engine.checkpoint.parts import write_parts
from fastmum.engine.checkpoint.ranks import Ranks
from fastmum.engine.checkpoint.snapshot import Snapshot

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that a process which ends without `close` gives the checkpoint that is being written


class Checkpoints:
    """Writes a run's checkpoints; all ranks call the same in the same order.

    `newest` is the newest checkpoint there is, `failed` counts those that could not be written, and `stall_seconds` is
    how long training has waited in `save` and `before_update`.

    Args:
        folder: of the checkpoints; made when the first is written. What a crash left half written there goes.
        keep: so many of the newest stay,
        keep_every: and those whose step is a multiple of this; 0: no others.
        background: write while training goes on; else `save` returns when the checkpoint is there.
        group: all ranks, over gloo, and used by nothing else meanwhile; None: a single process.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int = 0,
        background: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.newest = next((found.path for found in find_checkpoints(folder) if found.about), None)
        self.failed = 0
        self.stall_seconds = 0.0
        self._folder, self._keep, self._keep_every, self._background = folder, keep, keep_every, background
        self._ranks = Ranks(group)
        self._snapshot = Snapshot(self._ranks.rank, self._ranks.size)
        self._writing: threading.Thread | None = None
        self._error: CheckpointError | None = None  # of the last checkpoint
        if self._ranks.rank == 0:
            remove_partial(folder)

    def prepare(self, state: State) -> None:
        """Take the memory for copies of such a state before training; else the first `save` does.

        Raises:
            RuntimeError: there is not so much.
        """
        self._snapshot.make_buffers(state)

    def save(self, step: int, state: State, about: Mapping[str, Any]) -> None:
        """Begin a checkpoint of the state as it is now; waits for the one before, if that is still being written.

        One that cannot be written is logged and counted; training goes on.

        Args:
            step: optimiser steps done.
            state: tensors, DTensors and halves; those that are not sharded are the same on every rank. What is neither
                0-d nor called `meter.*` changes only behind `before_update`.
            about: JSON; `model_config` at least.
        """
        with self._stalling():
            self._join()
            values = json.loads(json.dumps({**about, "step": step}))
            tensors = {name: TensorAbout.of(tensor) for name, tensor in state.items()}
            self._snapshot.begin(state)
            arguments = (step, dict(state), values, tensors)
            if self._background:
                self._writing = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
                self._writing.start()
                # A process that ends while another thread is inside torch crashes; one whose peer is dead must end.
                atexit.register(self._writing.join, PATIENCE)
            else:
                self._write(*arguments)

    def before_update(self) -> None:
        """To be called before every optimiser update: waits until the state has been copied."""
        with self._stalling():
            self._snapshot.before_update()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is there.

        Raises:
            CheckpointError: the last one could not be written.
        """
        self._join()
        if self._error:
            raise self._error

    def close(self) -> None:
        """The same as `wait`, at the end."""
        self.wait()

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += time.perf_counter() - began

    def _join(self) -> None:
        if self._writing:
            self._writing.join()
            atexit.unregister(self._writing.join)
            self._writing = None

    def _write(self, step: int, state: State, values: dict[str, Any], tensors: dict[str, TensorAbout]) -> None:
        partial = self._folder / f"step_{step:07d}{PARTIAL}"
        try:
            self._ranks.each(self._snapshot.copy)
            if self._background:
                _step_back()
            self._ranks.first(lambda: _make_empty(partial))
            written = write_parts(partial, state, self._snapshot.parts, self._ranks)
            every = self._ranks.each(lambda: _synced(partial, written))
            files = {name: about for files in every for name, about in files.items()}
            self.newest = self._ranks.first(lambda: self._publish(About(partial, step, values, tensors, files)))
            self._error = None
        except Exception as error:  # in a thread that no one looks at, and training goes on
            self._fail(partial, error)

    def _publish(self, about: About) -> Path:
        about.write()
        sync_folder(about.path)
        path = about.path.rename(free_name(self._folder, about.step))
        sync_folder(self._folder)
        try:
            prune(self._folder, self._keep, self._keep_every)
        except OSError as error:
            log.warning("an old checkpoint in '%s' could not be deleted (%s)", self._folder, reason(error))
        return path

    def _fail(self, partial: Path, error: Exception) -> None:
        self.failed += 1
        self._error = CheckpointError(
            f"checkpoint '{partial.with_suffix('')}' could not be written ({reason(error)}); free space or mend the "
            "folder: the next one is tried anew"
        )
        log.debug("while writing '%s'", partial, exc_info=error)
        if self._ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            log.error("%s, and training goes on", self._error)


def _step_back() -> None:
    """Let training have the processor first, but never starve: Linux, where threads have priorities of their own."""
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _synced(folder: Path, written: dict[str, FileAbout]) -> dict[str, FileAbout]:
    sync_folder(folder)
    return written

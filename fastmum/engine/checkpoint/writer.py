"""Checkpoints written while training continues, each in a folder that appears when it is complete."""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmum.engine.checkpoint.manifest import (
    PARTIAL,
    CheckpointError,
    CheckpointManifest,
    State,
    TensorSpec,
    find_checkpoints,
    free_path,
    reason,
)
from fastmum.engine.checkpoint.shards import Group, Ranks, sync_folder, write_shards
from fastmum.engine.checkpoint.snapshot import Snapshot

log = logging.getLogger(__name__)

EXIT_TIMEOUT = 60.0  # seconds that a process which exits without `close` waits for the checkpoint being written


class Checkpoints:
    """Writes the checkpoints of a run; all ranks make the same calls in the same order.

    `newest` is the path of the newest checkpoint, `failed` the number of those that could not be written, and
    `stall_seconds` the time that training waited in `save` and `before_update`.

    Args:
        folder: of the checkpoints; leftovers of a crash in it are deleted.
        keep: number of newest checkpoints to keep.
        keep_every: multiples of this step are kept too; 0: none.
        background: write while training continues; otherwise `save` returns when the checkpoint is published.
        group: used by nothing else.
    """

    def __init__(
        self, folder: Path, keep: int, keep_every: int = 0, background: bool = True, group: Group = None
    ) -> None:
        self.newest = next((found.path for found in find_checkpoints(folder) if found.manifest), None)
        self.failed = 0
        self.stall_seconds = 0.0
        self._folder, self._keep, self._keep_every, self._background = folder, keep, keep_every, background
        self._ranks = Ranks(group)
        self._snapshot = Snapshot(self._ranks.rank, self._ranks.size)
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None  # of the last checkpoint
        if self._ranks.rank == 0:
            for leftover in folder.glob(f"*{PARTIAL}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def prepare(self, state: State) -> None:
        """Allocate the memory for copies of such a state before training; otherwise the first `save` does."""
        self._snapshot.allocate(state)

    def save(self, step: int, state: State, values: Mapping[str, Any], volatile: Collection[str] = ()) -> None:
        """Start a checkpoint of the current state; waits for the one before.

        A checkpoint that cannot be written is logged and counted; training continues.

        Args:
            step: optimiser steps done.
            state: tensors, DTensors and halves; those that are not sharded are equal on all ranks. They change only
                after `before_update`, except 0-d tensors, `meter.*` and those in `volatile`, which are cloned at once.
            values: JSON for the manifest, with the key `model_config`.
        """
        with self._count_stall():
            self._join()
            content = json.loads(json.dumps({**values, "step": step}))
            tensors = {name: TensorSpec.of(tensor) for name, tensor in state.items()}
            self._snapshot.begin(state, volatile)
            manifest = CheckpointManifest(self._folder / f"step_{step:07d}{PARTIAL}", step, content, tensors, {})
            if self._background:
                self._thread = threading.Thread(
                    target=self._write, args=(manifest, dict(state)), name="checkpoint", daemon=True
                )
                self._thread.start()
                # Exiting while another thread is inside torch crashes; exiting must not hang when a peer is dead.
                atexit.register(self._thread.join, EXIT_TIMEOUT)
            else:
                self._write(manifest, dict(state))

    def before_update(self) -> None:
        """Call before every optimiser update: waits until the state has been copied."""
        with self._count_stall():
            self._snapshot.before_update()

    def wait(self) -> None:
        """Wait for the checkpoint being written; CheckpointError if the last one could not be written."""
        self._join()
        if self._error:
            raise self._error

    close = wait

    @contextmanager
    def _count_stall(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += time.perf_counter() - began

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
            atexit.unregister(self._thread.join)
            self._thread = None

    def _write(self, manifest: CheckpointManifest, state: State) -> None:
        partial = manifest.path
        try:
            copies: dict[str, Tensor] = {}
            self._ranks.on_all(lambda: copies.update(self._snapshot.copy()))
            if self._background:
                _lower_priority()
            written = write_shards(partial, state, copies, self._ranks)
            for files in self._ranks.on_all(lambda: written):
                manifest.files.update(files)
            self.newest = self._ranks.on_main(lambda: self._publish(manifest))
            self._error = None
        except Exception as error:  # training continues
            self.failed += 1
            self._error = CheckpointError(
                f"checkpoint '{partial.with_suffix('')}' could not be written ({reason(error)}); free space or repair "
                "the folder: the next one will be tried"
            )
            log.debug("while writing '%s'", partial, exc_info=error)
            if self._ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                log.error("%s; training continues", self._error)

    def _publish(self, manifest: CheckpointManifest) -> Path:
        manifest.write()
        sync_folder(manifest.path)
        path = manifest.path.rename(free_path(self._folder / f"step_{manifest.step:07d}"))
        sync_folder(self._folder)
        try:
            self._prune()
        except OSError as error:
            log.warning("an old checkpoint in '%s' could not be deleted (%s)", self._folder, reason(error))
        return path

    def _prune(self) -> None:
        """Delete what `keep` and `keep_every` do not cover; of equal steps, all but the last written."""
        seen: set[int] = set()
        for path, manifest, _ in find_checkpoints(self._folder):
            if manifest is None:
                continue  # perhaps a transient error; set aside on resume
            step = manifest.step
            wanted = len(seen) < self._keep or (self._keep_every and step % self._keep_every == 0)
            if step in seen or not wanted:
                # Renamed first: an interrupted deletion leaves no checkpoint that looks intact.
                shutil.rmtree(path.rename(free_path(path.with_name(path.name + PARTIAL))))
            seen.add(step)


def _lower_priority() -> None:
    """Let training use the processor first, without starving: on Linux, threads have their own nice values."""
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)

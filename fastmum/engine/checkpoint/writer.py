"""Checkpoints written while training continues, each in a folder that appears when it is complete.

Only the optimiser's update changes weights and moments. They are copied to the CPU during the forward and backward pass
of the next step, by another thread and on CUDA by another stream; the next update waits for the copy. Halves are joined
to float32 on the way.
"""

import atexit
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastmum.engine.checkpoint.manifest import (
    PARTIAL,
    CheckpointError,
    CheckpointManifest,
    State,
    TensorSpec,
    find_checkpoints,
    reason,
)
from fastmum.engine.checkpoint.shards import Group, Ranks, sync_folder, write_shards
from fastmum.engine.gradients import local
from fastmum.files import free_path
from fastmum.kernels.adamw import Halves

log = logging.getLogger(__name__)

EXIT_TIMEOUT = 60.0  # seconds that a process which exits without `close` waits for the checkpoint being written


class Snapshot:
    """The shards that one rank writes, copied into reused buffers.

    DCP's `DefaultStager` stages replicated tensors on every rank, is not ordered with the updates, cannot join halves.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._buffers: dict[str, Tensor] = {}
        self._live: Mapping[str, Tensor | Halves] = {}
        self._queued = threading.Event()  # all copies are done or queued on the device
        self._queued.set()
        self._stream: torch.cuda.Stream | None = None
        self._before: torch.cuda.Event | None = None  # the copy starts after this
        self._after: torch.cuda.Event | None = None  # the next update starts after this

    @torch.no_grad()
    def begin(self, state: State, volatile: Collection[str] = ()) -> None:
        """Select the state as it is now on the device; clones what changes at any time, without a synchronisation."""
        shards = own_shards(state, self._rank, self._size)
        for name, shard in shards.items():
            if isinstance(shard, Tensor) and (shard.ndim == 0 or name.startswith("meter.") or name in volatile):
                shards[name] = shard.clone()
        self._live = shards
        device = next((tensor.device for tensor in map(_tensor, shards.values()) if tensor.is_cuda), None)
        if device:
            self._stream = self._stream or torch.cuda.Stream(device)
            self._before, self._after = torch.cuda.Event(), torch.cuda.Event()
            self._before.record(torch.cuda.current_stream(device))
        self._queued.clear()

    @torch.no_grad()
    def copy(self) -> dict[str, Tensor]:
        """Copy the selected state; returns the copies when they are complete."""
        stream, before, after = self._stream, self._before, self._after
        try:
            self.allocate(self._live)
            with torch.cuda.stream(stream) if stream else nullcontext():
                if before:
                    before.wait()
                for name, live in self._live.items():
                    tensor = live.join() if isinstance(live, Halves) else live
                    self._buffers[name].copy_(tensor, non_blocking=True)
                if after:
                    after.record()
        finally:
            self._queued.set()
        if after:
            after.synchronize()
        return {name: self._buffers[name] for name in self._live}

    def before_update(self) -> None:
        """Wait until the state may change: on CUDA the device waits for the copy, not the host."""
        self._queued.wait()
        if self._stream and self._after:
            torch.cuda.current_stream(self._stream.device).wait_event(self._after)
            self._after = None

    def allocate(self, shards: Mapping[str, Tensor | Halves]) -> None:
        """Allocate and touch the buffers: the first time is slow."""
        for name, shard in shards.items():
            if name not in self._buffers or self._buffers[name].shape != shard.shape:
                # The strides of the live tensor make the copy contiguous; zeros touch the pages.
                like = _tensor(shard).detach()
                buffer = torch.empty_like(like, dtype=shard.dtype, device="cpu", pin_memory=like.is_cuda)
                self._buffers[name] = buffer.zero_()


def _tensor(shard: Tensor | Halves) -> Tensor:
    return shard.parameter if isinstance(shard, Halves) else shard


def own_shards(state: State, rank: int, size: int) -> dict[str, Tensor | Halves]:
    """Local shards that this rank writes; of replicas each rank writes an equal number of bytes.

    Needs no communication: names and global shapes are equal on all ranks. TypeError: a tensor is a partial sum.
    """
    loads: dict[int, list[int]] = {}  # number of replicas -> bytes assigned to each
    shards: dict[str, Tensor | Halves] = {}
    for name in sorted(state):
        tensor = state[name]
        replicas, replica = _replica(name, tensor) if isinstance(tensor, DTensor) else (size, rank)
        load = loads.setdefault(replicas, [0] * replicas)
        writer = load.index(min(load))
        load[writer] += tensor.nbytes
        if writer == replica:
            shards[name] = tensor if isinstance(tensor, Halves) else local(tensor.detach())
    return shards


def _replica(name: str, tensor: DTensor) -> tuple[int, int]:
    """Number of replicas of this rank's shard, and the index of this one."""
    replicas, replica = 1, 0
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            size = tensor.device_mesh.size(dim)
            replicas, replica = replicas * size, replica * size + tensor.device_mesh.get_local_rank(dim)
        elif not isinstance(placement, Shard):
            raise TypeError(f"{name} is placed {tensor.placements}, but must be sharded or replicated")
    return replicas, replica


class Checkpoints:
    """Writes the checkpoints of a run; all ranks make the same calls in the same order.

    `newest` is the path of the newest checkpoint, `failed` the number of those that could not be written, and
    `stall_seconds` the time that training waited in `save` and `before_update`.

    Args:
        folder: of the checkpoints; leftovers of a crash in it are deleted.
        keep, keep_every: number of newest checkpoints to keep; multiples of this step are kept too, 0: none.
        background: write while training continues; otherwise `save` returns when the checkpoint is published.
        group: used by nothing else.
    """

    def __init__(
        self, folder: Path, keep: int, keep_every: int = 0, background: bool = True, group: Group = None
    ) -> None:
        self.newest = next((found.path for found in find_checkpoints(folder) if found.manifest), None)
        self.failed, self.stall_seconds = 0, 0.0
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
        self._snapshot.allocate(own_shards(state, self._ranks.rank, self._ranks.size))

    def save(self, step: int, state: State, values: Mapping[str, Any], volatile: Collection[str] = ()) -> None:
        """Start a checkpoint of the state after `step` steps; waits for the one before.

        A checkpoint that cannot be written is logged and counted; training continues.

        Args:
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
                self._thread = threading.Thread(target=self._write, args=(manifest, dict(state)), daemon=True)
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
                with suppress(AttributeError, OSError):  # on Linux, threads have their own nice values
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
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
        if wrong := manifest.missing():
            raise CheckpointError(f"{wrong}: all processes must see one folder")
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

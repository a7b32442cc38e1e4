"""CPU copies of the training state, made while training continues.

Only the optimiser's update changes weights and moments. They are copied during the forward and backward pass of the
next step, by another thread and on CUDA by another stream; the next update waits for the copy. Halves are joined to
float32 on the way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastmum.engine.checkpoint.manifest import State
from fastmum.engine.gradients import local
from fastmum.kernels.halves import Halves


class Snapshot:
    """The shards that one rank writes, copied into reused buffers.

    Not DCP's `DefaultStager`: it stages replicated tensors on every rank, its stream does not wait for the last update
    nor the next update's stream for it, and it cannot join halves.
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

    def allocate(self, state: State) -> None:
        """Allocate and touch the buffers for a state before training: the first time is slow."""
        self._allocate(own_shards(state, self._rank, self._size))

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
            self._allocate(self._live)
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
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

    def _allocate(self, shards: Mapping[str, Tensor | Halves]) -> None:
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

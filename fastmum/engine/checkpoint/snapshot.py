"""Copies of a running state on the CPU, made while training goes on.

Only the optimiser's update changes weights and moments. So they are copied during the next step's forward and backward
pass, by another thread and on CUDA by another stream, and the update after those waits for the copy. Tensors kept in
halves are joined then, one after another.
"""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastmum.engine.checkpoint.about import State
from fastmum.engine.gradients import local
from fastmum.kernels.halves import Halves


class Snapshot:
    """What one rank contributes to a checkpoint, in buffers that are used again for the next.

    Args:
        rank, size: of the processes that share the state.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._buffers: dict[str, Tensor] = {}
        self._queued = threading.Event()  # nothing reads the live tensors, or what does is queued on the device
        self._queued.set()
        self._state: State = {}
        self._live: dict[str, Tensor | Halves] = {}
        self._side: torch.cuda.Stream | None = None
        self._before: torch.cuda.Event | None = None  # the copy must come after this
        self._after: torch.cuda.Event | None = None  # and the next update after this

    @property
    def parts(self) -> dict[str, Tensor]:
        """This rank's copies by name, whole once `copy` has returned."""
        return {name: self._buffers[name] for name in self._live}

    @torch.no_grad()
    def make_buffers(self, state: State) -> None:
        """Take the memory that copies of this state need, which is slow the first time.

        Raises:
            RuntimeError: there is not so much.
        """
        for name, live in own_parts(state, self._rank, self._size).items():
            if name not in self._buffers or self._buffers[name].shape != live.shape:
                # In the layout of the live tensor, which is copied as it lies; pinned, for the device to write to.
                like = _like(live)
                buffer = torch.empty_like(like, dtype=live.dtype, device="cpu", pin_memory=like.is_cuda)
                self._buffers[name] = buffer.zero_()

    @torch.no_grad()
    def begin(self, state: State) -> None:
        """Fix what is copied: the state as it is now on the device. The last copy must be through.

        What else than the update may change, counters and what meters have added up, is set apart at once, without
        waiting for the device.

        Raises:
            TypeError: a tensor is neither replicated nor sharded.
        """
        parts = own_parts(state, self._rank, self._size)
        self._live = {name: part.clone() if _volatile(name, part) else part for name, part in parts.items()}
        self._state = state
        device = next((like.device for like in map(_like, parts.values()) if like.is_cuda), None)
        if device:
            self._side = self._side or torch.cuda.Stream(device)
            self._before, self._after = torch.cuda.Event(), torch.cuda.Event()
            self._before.record(torch.cuda.current_stream(device))
        self._queued.clear()

    @torch.no_grad()
    def copy(self) -> None:
        """Copy what `begin` fixed; returns when the copies are whole.

        Raises:
            RuntimeError: there is not the memory for it.
        """
        after = self._after
        try:
            self.make_buffers(self._state)
            if after:
                self._before.wait(self._side)
                with torch.cuda.stream(self._side):
                    self._copy()
                    after.record()
            else:
                self._copy()
        finally:
            self._queued.set()
        if after:
            after.synchronize()

    def _copy(self) -> None:
        for name, live in self._live.items():
            self._buffers[name].copy_(live.join() if isinstance(live, Halves) else live, non_blocking=True)

    def before_update(self) -> None:
        """Let what comes next change the state: waits for the copy, on CUDA on the device instead of here."""
        self._queued.wait()
        if self._after:
            torch.cuda.current_stream(self._side.device).wait_event(self._after)
            self._after = None


def _volatile(name: str, part: Tensor | Halves) -> bool:
    return isinstance(part, Tensor) and (part.ndim == 0 or name.startswith("meter."))


def _like(part: Tensor | Halves) -> Tensor:
    """One with the device and the layout of a part."""
    return part.parameter if isinstance(part, Halves) else part


def own_parts(state: State, rank: int, size: int) -> dict[str, Tensor | Halves]:
    """Local parts that this rank writes. Parts that several ranks have are dealt out so that each writes as much.

    Needs no communication: names and global shapes are the same everywhere.

    Raises:
        TypeError: a tensor is neither replicated nor sharded.
    """
    loads: dict[int, list[int]] = {}  # number of copies of a part -> bytes dealt to the holder of each copy
    parts = {}
    for name in sorted(state):
        tensor = state[name]
        copies, ours = _copies(name, tensor, rank, size)
        load = loads.setdefault(copies, [0] * copies)
        holder = load.index(min(load))
        load[holder] += tensor.nbytes
        if holder == ours:
            parts[name] = tensor if isinstance(tensor, Halves) else local(tensor.detach())
    return parts


def _copies(name: str, tensor: Tensor | Halves, rank: int, size: int) -> tuple[int, int | None]:
    """How many ranks hold the same part as this one, and this one's number among them."""
    if not isinstance(tensor, DTensor):
        return size, rank
    if not all(isinstance(placement, Shard | Replicate) for placement in tensor.placements):
        raise TypeError(f"{name} is placed {tensor.placements}, but must be sharded or replicated")
    replicated = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
    sizes = [tensor.device_mesh.size(dim) for dim in replicated]
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # not of the mesh
        return prod(sizes), None
    number = 0
    for dim, length in zip(replicated, sizes, strict=True):
        number = number * length + coordinate[dim]
    return prod(sizes), number

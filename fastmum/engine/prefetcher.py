"""Batches on the device: the next one is copied while the work on the current one is queued."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a pytree; copies to a GPU start from pinned memory and are not waited for."""

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        pinned = x.pin_memory() if device.type == "cuda" and not x.is_cuda else x
        return pinned.to(device, non_blocking=True)

    return pytree.tree_map(move, batch)


class Prefetcher:
    """An iterator over a task's batches that moves them to the device, on CUDA one ahead on a separate stream.

    Args:
        batches: pytrees of tensors.
        device: of the model.

    Attributes:
        wait_seconds: time that the training loop has waited for `batches`.
    """

    def __init__(self, batches: Iterator[Any], device: torch.device) -> None:
        self.wait_seconds = 0.0
        self._source, self._device = batches, device
        self._moved: Generator[Any, None, None] = (
            self._ahead() if device.type == "cuda" else (to_device(batch, device) for batch in self._timed())
        )

    def __iter__(self) -> Iterator[Any]:
        return self._moved

    def __next__(self) -> Any:
        return next(self._moved)

    def close(self) -> None:
        """Stop the source."""
        self._moved.close()
        if hasattr(self._source, "close"):
            self._source.close()

    def _timed(self) -> Iterator[Any]:
        while True:
            began = time.perf_counter()
            batch = next(self._source, None)
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _ahead(self) -> Generator[Any, None, None]:
        copies = torch.cuda.Stream(self._device)
        waiting: tuple[Any, torch.cuda.Event] | None = None
        for batch in self._timed():
            if any(isinstance(x, Tensor) and x.is_cuda for x in pytree.tree_leaves(batch)):
                # Decoded on the GPU by DALI, whose memory must not be held beyond the next batch.
                yield to_device(batch, self._device)
                continue
            with torch.cuda.stream(copies):
                moved = to_device(batch, self._device)
                done = torch.cuda.Event()
                done.record(copies)
            if waiting is not None:
                yield self._arrived(*waiting)
            waiting = moved, done
        if waiting is not None:
            yield self._arrived(*waiting)

    def _arrived(self, batch: Any, copied: torch.cuda.Event) -> Any:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        for x in pytree.tree_leaves(batch):
            if isinstance(x, Tensor):
                x.record_stream(stream)  # allocated on the other stream
        return batch

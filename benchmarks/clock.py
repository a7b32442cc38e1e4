"""Marks in time on a device: the host's clock on a CPU, events in the stream on a GPU."""

from __future__ import annotations

from time import perf_counter

import torch

Mark = float | torch.cuda.Event


class Clock:
    """Takes the time of work on a device without stopping it in between.

    Args:
        device: that does the work. On CUDA a mark is an event in the current stream, so what is timed is what the GPU
            does and waits for, launches included where they hold it up.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._on_cuda = torch.device(device).type == "cuda"

    def mark(self) -> Mark:
        """Now, for the device."""
        if not self._on_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has done everything that it was given."""
        if self._on_cuda:
            torch.cuda.synchronize()

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Between two marks; on CUDA after `wait`."""
        return begin.elapsed_time(end) / 1e3 if self._on_cuda else end - begin

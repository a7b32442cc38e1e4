"""The mean loss and the pace of training between two log steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fastmum.data.loader import Loader


class Meter:
    """Adds losses up on the device, so that steps between log steps do not wait for it.

    Args:
        device: of the losses.
        loader: whose waiting time is reported.
        state: of the run that is resumed, so that its first mean covers the same steps as without the break.
    """

    def __init__(self, device: torch.device, loader: Loader, state: dict[str, float] | None = None) -> None:
        self._loader = loader
        self._losses = torch.zeros((), dtype=torch.float64, device=device)
        self._steps = 0
        if state:
            self._losses += state["losses"]
            self._steps = int(state["steps"])
        self._frames, self._seconds, self._waited = 0, 0.0, loader.wait_seconds
        self._began = time.perf_counter()

    def add(self, loss: Tensor, frames: int) -> None:
        """Count one step."""
        self._losses += loss.detach()
        self._steps += 1
        self._frames += frames

    def read(self) -> dict[str, float]:
        """Mean loss, frames a second and the share of time that training waited for data; starts anew."""
        values = {"loss": self._losses.item() / self._steps}
        seconds = self._seconds + time.perf_counter() - self._began
        values["frames_per_s"] = self._frames / seconds
        values["data_wait"] = (self._loader.wait_seconds - self._waited) / seconds
        self._losses.zero_()
        self._steps, self._frames, self._seconds, self._waited = 0, 0, 0.0, self._loader.wait_seconds
        self._began = time.perf_counter()
        return values

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the pace: it is not training."""
        self._seconds += time.perf_counter() - self._began
        try:
            yield
        finally:
            self._began = time.perf_counter()

    def state(self) -> dict[str, float]:
        """What a resumed run needs to continue the mean."""
        return {"losses": self._losses.item(), "steps": self._steps}

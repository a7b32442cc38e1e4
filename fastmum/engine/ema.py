"""Exponential moving average of the weights (`train.ema`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmum.engine.gradients import local
from fastmum.engine.optimizer import Weight


class Ema:
    """float32 averages of the trainable weights, sharded as they are.

    Args:
        weights: of the optimizer; the average starts at their values when `restart` is called.
        decay: share of the old average that a step keeps.
    """

    def __init__(self, weights: Sequence[Weight], decay: float) -> None:
        self._weights, self._decay = weights, decay
        self._averages = {w.name: torch.zeros_like(w.parameter.detach(), dtype=torch.float32) for w in weights}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the weights as they are."""
        for w in self._weights:
            self._averages[w.name].copy_(w.master)

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Average in the weights of a step; a skipped step (`found_inf` is 1) changes nothing."""
        share = (1 - self._decay) * (1 - found_inf)
        for w in self._weights:
            local(self._averages[w.name]).lerp_(local(w.master), share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Compute with the averages inside the block: they replace the parameters' values, which come back after it."""
        with torch.no_grad():
            kept = [local(w.parameter).clone() for w in self._weights]
            for w in self._weights:
                local(w.parameter).copy_(local(self._averages[w.name]))
        try:
            yield
        finally:
            with torch.no_grad():
                for w, values in zip(self._weights, kept, strict=True):
                    local(w.parameter).copy_(values)

    def state(self) -> dict[str, Tensor]:
        """Live averages by name, to save and to fill in place."""
        return {f"ema.{name}": average for name, average in self._averages.items()}

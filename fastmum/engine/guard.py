"""Steps with a non-finite loss or gradient: skipped and counted on the device; too many in a row stop the run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmum.errors import FastmumError


class TrainingError(FastmumError):
    """Training that cannot continue."""


class NonFiniteGuard:
    """Checks steps without a synchronisation.

    Args:
        device: of the model.

    Attributes:
        counts: (4,) int64 on the device, the same on all processes: length of the current row of bad steps, bad steps
            in total, length of the longest row, last step of that row.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)

    def check(self, step: int, loss: Tensor, *norms: Tensor) -> Tensor:
        """found_inf of a step: 0-d float32 on the device, 1 if the loss or a norm is not finite.

        Args:
            step: its number.
            loss, norms: 0-d, reduced over all processes.
        """
        finite = loss.isfinite()
        for norm in norms:
            finite = finite & norm.isfinite()
        bad = ~finite
        row, total, longest, end = self.counts.unbind()
        row = (row + 1) * bad
        is_longest = row > longest
        end = torch.where(is_longest, step, end)
        self.counts.copy_(torch.stack([row, total + bad, torch.maximum(row, longest), end]))
        return bad.float()

    def state(self) -> dict[str, Tensor]:
        """Copies of the counts, to save or to load into."""
        return {"meter.bad_steps": self.counts.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue counting."""
        self.counts.copy_(state["meter.bad_steps"])

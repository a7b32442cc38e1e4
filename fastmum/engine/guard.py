"""Steps whose loss or gradient is not finite: passed over on the device, counted there, and stopped when too many."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class NonFiniteGuard:
    """Judges steps without waiting for them.

    Args:
        device: of the model.

    Attributes:
        counts: (4,) int64 on the device: bad steps in a row up to now; bad steps in all; the longest row; the step that
            it ended with. The same on all processes, as what they judge is.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)

    def judge(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step is to be passed over: 0-d float32 on the device, 1 where loss or norm are not finite.

        Args:
            step: its number.
            loss, norm: 0-d, of all processes together.
        """
        bad = ~(loss.isfinite() & norm.isfinite())
        row, total, longest, end = self.counts.unbind()
        row = (row + 1) * bad
        is_longest = row > longest
        end = torch.where(is_longest, step, end)
        self.counts.copy_(torch.stack([row, total + bad, torch.maximum(row, longest), end]))
        return bad.float()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on counting."""
        return {"meter.bad_steps": self.counts.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on counting."""
        self.counts.copy_(state["meter.bad_steps"])

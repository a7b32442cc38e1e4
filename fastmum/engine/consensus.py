"""A number that all processes agree on at the same step, and no device is waited for: has anyone been told to stop?"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastmum.engine.distributed import DistContext


class StopConsensus:
    """The largest of the numbers that the processes bring at a step, known to all one step later.

    The numbers travel on the CPU while the step is computed, and nobody waits for them. A single process knows at once.
    """

    def __init__(self, world: DistContext) -> None:
        self._group = world.control
        self._under_way: tuple[dist.Work, Tensor] | None = None

    def largest(self, number: int) -> int:
        """Bring a number, and get what was brought the last time; 0 the first time."""
        if self._group is None:
            return number
        result = self.finish()
        brought = torch.tensor(number)
        self._under_way = dist.all_reduce(brought, dist.ReduceOp.MAX, group=self._group, async_op=True), brought
        return result

    def finish(self) -> int:
        """What was brought the last time, with nothing left under way."""
        if self._under_way is None:
            return 0
        work, brought = self._under_way
        self._under_way = None
        work.wait()
        return int(brought)

"""Stopping a run without losing work: a signal ends the current step on all ranks, then the run saves.

SLURM sends SIGUSR1 (`#SBATCH --signal=USR1@180`) or SIGTERM before it takes the nodes away. The run then exits with
`REQUEUE`, and `launch/slurm.sh` queues the job again.
"""

import signal
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from fastmum.engine.distributed import DistContext

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: temporary failure, try again later
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Context manager that records the first of `SIGNALS` in `signal`; a second SIGINT acts at once, as usual.

    Repeated SIGTERM and SIGUSR1 are ignored: launchers signal all processes twice.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])


class StopConsensus:
    """Non-blocking MAX all-reduce of the stop flag over gloo: every rank learns one step later about any signal."""

    def __init__(self, world: DistContext) -> None:
        self._group = world.control
        self._pending: tuple[dist.Work, Tensor] | None = None

    def largest(self, number: int) -> int:
        """Start the all-reduce of this step's flag and return the maximum of the previous step's, at first 0."""
        if self._group is None:
            return number
        result = self.finish()
        flag = torch.tensor(number)
        self._pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag
        return result

    def finish(self) -> int:
        """Wait for the pending all-reduce and return its maximum, 0 if none is pending."""
        if self._pending is None:
            return 0
        (work, flag), self._pending = self._pending, None
        work.wait()
        return int(flag)


def exit_code(number: int) -> int:
    """Exit code after a signal: `REQUEUE`, or 130 after Ctrl-C."""
    return 128 + number if number == signal.SIGINT else REQUEUE

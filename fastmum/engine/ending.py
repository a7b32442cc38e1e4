"""End of a run whose data fail on one process: all agree on the last whole step, save it, and raise the error.

A process without a batch must not leave a step that the others wait in. It continues with the batch before and marks
the step as void: the device then skips the update on all processes, and one step later all know (`StopConsensus`).
"""

import contextlib
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from fastmum.engine.checkpoint import CheckpointError, Checkpoints, set_aside_after
from fastmum.engine.distributed import DistContext
from fastmum.engine.task import Task
from fastmum.errors import FastmumError, StoppedError

VOID = 1 << 7  # added to the signal's number in the flag of a process that has no batch


class Tally:
    """Non-blocking SUM all-reduce of the task's counts over gloo: every rank gets the sums one step later."""

    def __init__(self, task: Task) -> None:
        self._task, self._group = task, task.world.control
        self._pending: tuple[dist.Work, Tensor] | None = None

    def step(self) -> None:
        """Start the all-reduce of this step's counts, and give the task the sums of the step before."""
        self.finish()
        counts = None if self._group is None else self._task.tally()
        if counts is not None:
            self._pending = dist.all_reduce(counts, group=self._group, async_op=True), counts

    def finish(self) -> None:
        """Wait for the pending all-reduce."""
        if self._pending is not None:
            (work, counts), self._pending = self._pending, None
            work.wait()
            self._task.pool(counts)


def drop_after(folder: Path, step: int, checkpoints: Checkpoints, world: DistContext) -> None:
    """Set aside checkpoints of void steps, those after `step`; called by all processes."""
    with contextlib.suppress(CheckpointError):
        checkpoints.close()
    if world.is_main:
        set_aside_after(folder, step)
    world.wait()


def first_error(own: FastmumError | None, world: DistContext) -> FastmumError | None:
    """The error of this process, or that of the first rank that has one; called by all processes."""
    own = None if isinstance(own, StoppedError) else own
    errors = enumerate(world.gather(None if own is None else str(own)))
    return own or next((FastmumError(f"rank {rank}: {error}") for rank, error in errors if error is not None), None)

"""Work that several processes share: all of them succeed, or all of them fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from fastmum.engine.checkpoint.errors import CheckpointError, reason

T = TypeVar("T")


class Ranks:
    """The processes of a run.

    Args:
        group: all of them, over gloo; None: there is but this one.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1

    def each(self, compute: Callable[[], T]) -> list[T]:
        """What `compute` returns on every rank, on every rank.

        Raises:
            CheckpointError: it raised on any; on all ranks alike.
        """
        outcomes = [_attempt(compute)]
        if self.group:
            ours, outcomes = outcomes[0], [None] * self.size
            dist.all_gather_object(outcomes, ours, group=self.group)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, CheckpointError):
                raise type(outcome)(f"rank {rank}: {outcome}" if self.size > 1 else str(outcome))
        return outcomes

    def first(self, compute: Callable[[], T]) -> T:
        """What `compute` returns on rank 0, the only one to call it, on every rank.

        Raises:
            CheckpointError: it raised; on all ranks alike.
        """
        outcome = [_attempt(compute) if self.rank == 0 else None]
        if self.group:
            dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if isinstance(outcome[0], CheckpointError):
            raise outcome[0]
        return outcome[0]


def _attempt(compute: Callable[[], T]) -> T | CheckpointError:
    try:
        return compute()
    except CheckpointError as error:
        return error
    except Exception as error:  # whatever it is, the others must hear of it
        return CheckpointError(reason(error))

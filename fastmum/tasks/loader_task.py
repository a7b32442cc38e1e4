"""A task whose frames are decoded by a `PlanLoader`: bad frames are counted over all processes, and logged."""

from typing import Any

import torch
from torch import Tensor

from fastmum.data.loader import PlanLoader
from fastmum.engine.task import Task


class LoaderTask(Task):
    """The operations that all such tasks share."""

    _loader: PlanLoader[Any, Any]

    def tally(self) -> Tensor:
        return torch.from_numpy(self._loader.faults.tally())

    def pool(self, total: Tensor) -> None:
        self._loader.faults.pool(total.numpy())

    def close(self) -> None:
        self._loader.faults.close()

    def counters(self) -> dict[str, float | None]:
        counts = self._loader.faults.counts
        return {"bad_frames": sum(counts.values()), **{f"bad_frames/{name}": n for name, n in counts.items()}}

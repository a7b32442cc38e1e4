"""A task whose frames are drawn by a planner and decoded by a `PlanLoader`, which counts and logs bad ones."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmum.data.loader import PlanLoader
from fastmum.engine.task import Task


class LoaderTask(Task):
    """The operations that all such tasks share.

    Attributes:
        shown: names of the values in the line that ends a run.
    """

    shown: ClassVar[tuple[str, ...]] = ()
    _splits: Any  # with `manifests`, and the planners `training` and `held_out`, by `open_data`
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

    def data_digests(self) -> dict[str, str]:
        splits = self._splits
        manifests = {str(part.path): part.checksum for part in splits.manifests.parts}
        return manifests | getattr(splits.training, "digests", {})

    def summary(self, values: Mapping[str, float | None]) -> str:
        return ", ".join(f"{name} {value:.4g}" for name in self.shown if (value := values.get(name)) is not None)

    @property
    def evaluates(self) -> bool:
        return self._splits.held_out is not None

    def held_out_plans(self) -> dict[int, Any]:
        """Numbers and plans of the held-out batches of this process; empty if nothing is held out.

        Every process has as many batches, since FSDP's collectives must match: those without one repeat the last.
        Numbers from `train.eval_batches` on are such repetitions, which must not count.
        """
        planner, count, size = self._splits.held_out, self.config.train.eval_batches, self.world.size
        numbers = range(self.world.rank, -(-count // size) * size, size) if planner is not None else ()
        return {i: planner.plan(min(i, count - 1)) for i in numbers}

    def places(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Step and part, the arguments of the planner, of the micro-batches of this process."""
        first = self.world.rank * self.batches_per_step
        return ((step, part) for step in range(start, stop) for part in range(first, first + self.batches_per_step))

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        plans = (self._splits.training.plan(*place) for place in self.places(start, stop))
        return self._loader.batches(plans, self.stopping)

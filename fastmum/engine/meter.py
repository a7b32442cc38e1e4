"""Means of a task's metrics and the pace of training between two log steps, summed on the device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastmum.engine.distributed import DistContext
from fastmum.engine.task import Metric, StepOutput


class Meter:
    """Sums and counts of metrics over steps and processes.

    Args:
        metrics: of the task, by name.
        world: of the processes.
    """

    def __init__(self, metrics: Mapping[str, Metric], world: DistContext) -> None:
        self._metrics, self._world = {"loss": Metric()} | dict(metrics), world
        columns = sum(max(1, metric.size) for metric in self._metrics.values())
        # Sums and counts of this process: (2, columns).
        self._totals = torch.zeros(2, columns, dtype=torch.float64, device=world.device)
        self._samples, self._seconds = 0, 0.0
        self._began = time.perf_counter()

    def totals_of(self, output: StepOutput) -> Tensor:
        """Sums and counts of a micro-batch, (2, columns) float64."""
        device, columns = self._totals.device, []
        for name in self._metrics:
            if name == "loss" and name not in output.metrics:
                pair: tuple[Tensor | float, Tensor | float] = output.loss_sum.detach(), output.weight
            else:
                pair = output.metrics[name]
            values = [torch.as_tensor(x, dtype=torch.float64, device=device).reshape(-1) for x in pair]
            columns.append(torch.stack(values))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def add(self, totals: Tensor, found_inf: Tensor, samples: int) -> None:
        """Count a step of this process.

        Args:
            totals: sum of `totals_of` its micro-batches.
            found_inf: 0-d, 1 if the step was skipped; it is then left out of the means.
            samples: of this process.
        """
        self._totals += torch.where(found_inf > 0, 0.0, totals)
        self._samples += samples

    def read(self, *others: Tensor) -> tuple[dict[str, float | None], float, int, list[float]]:
        """Read the means and start again: the only wait for the device.

        Args:
            others: 0-d or small tensors to read in the same transfer, the same on all processes.

        Returns:
            Means by name (None for `loss` if all steps were skipped; others are left out without a count), seconds of
            training and samples of all processes in them, and the values of the others.
        """
        totals = torch.cat([self._totals.flatten(), self._totals.new_tensor([self._samples])])
        self._world.sum_(totals)
        values = torch.cat([totals, *(x.double().flatten() for x in others)]).tolist()
        count = self._totals.shape[1]
        sums, counts, samples, rest = (
            values[:count], values[count : 2 * count], round(values[2 * count]), values[2 * count + 1 :],
        )  # fmt: skip
        means: dict[str, float | None] = {"loss": None}
        start = 0
        for name, metric in self._metrics.items():
            stop = start + max(1, metric.size)
            pairs = list(zip(sums[start:stop], counts[start:stop], strict=True))
            total = sum(counts[start:stop])
            if total:
                means[name] = sum(sums[start:stop]) / total
            if metric.size:
                means |= {f"{name}/{metric.index_name}_{i}": s / n for i, (s, n) in enumerate(pairs) if n}
            start = stop
        seconds = self._seconds + time.perf_counter() - self._began
        self._totals.zero_()
        self._samples, self._seconds = 0, 0.0
        self._began = time.perf_counter()
        return means, seconds, samples, rest

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block out of the pace."""
        self._seconds += time.perf_counter() - self._began
        try:
            yield
        finally:
            self._began = time.perf_counter()

    def state(self) -> dict[str, Tensor]:
        """Sums and counts of all processes together, to save or to load into."""
        totals = self._totals.clone()
        self._world.sum_(totals)
        return {"meter.totals": totals}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue the means; the first process takes the sums of all."""
        if self._world.is_main:
            self._totals.copy_(state["meter.totals"])

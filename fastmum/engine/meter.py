"""The numbers of a log line: means of metrics, summed on the device; throughput, FLOP utilisation, device-hours."""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmum.engine.distributed import DistContext
from fastmum.engine.gpus import PAPER_RUNS, SOURCE, peak_flops
from fastmum.engine.task import Metric, StepOutput, Task


class Meter:
    """Sums and counts of a task's metrics over steps and processes."""

    def __init__(self, metrics: Mapping[str, Metric], world: DistContext) -> None:
        self._metrics, self._world = {"loss": Metric()} | dict(metrics), world
        columns = sum(max(1, metric.size) for metric in self._metrics.values())
        # Sums and counts of this process: (2, columns).
        self._totals = torch.zeros(2, columns, dtype=torch.float64, device=world.device)
        self._samples, self._seconds, self._began = 0, 0.0, time.perf_counter()

    def totals_of(self, output: StepOutput) -> Tensor:
        """Sums and counts of a micro-batch, (2, columns) float64."""
        device, columns = self._totals.device, []
        metrics: dict[str, Any] = {"loss": (output.loss_sum.detach(), output.weight), **output.metrics}
        for name in self._metrics:
            # A fill, unlike a copy of a number from the host, does not wait for the device.
            values = [
                x.to(torch.float64).reshape(-1) if isinstance(x, Tensor)
                else torch.full((1,), x, dtype=torch.float64, device=device)
                for x in metrics[name]
            ]  # fmt: skip
            columns.append(torch.stack(values))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def add(self, totals: Tensor, found_inf: Tensor, samples: int) -> None:
        """Count a step: the sum of `totals_of` its micro-batches, left out of the means if `found_inf` (0-d) is 1."""
        self._totals += torch.where(found_inf > 0, 0.0, totals)
        self._samples += samples

    def read(self, *others: Tensor) -> tuple[dict[str, float | None], float, int, list[float]]:
        """Read the means and start again: the only wait for the device.

        Returns means by name (None for `loss` if all steps were skipped; others are left out without a count), seconds
        of training and samples of all processes in them, and the values of `others`: small tensors that are the same on
        all processes, read in the same transfer.
        """
        totals = torch.cat([self._totals.flatten(), self._totals.new_tensor([self._samples])])
        self._world.sum_(totals)
        values = torch.cat([totals, *(x.double().flatten() for x in others)]).tolist()
        count = self._totals.shape[1]
        columns, (samples, *rest) = zip(values[:count], values[count : 2 * count], strict=True), values[2 * count :]
        means: dict[str, float | None] = {"loss": None}
        for name, metric in self._metrics.items():
            pairs = list(itertools.islice(columns, max(1, metric.size)))
            if total := sum(n for _, n in pairs):
                means[name] = sum(s for s, _ in pairs) / total
            if metric.size:
                means |= {f"{name}/{metric.index_name}_{i}": s / n for i, (s, n) in enumerate(pairs) if n}
        seconds = self._seconds + time.perf_counter() - self._began
        self._totals.zero_()
        self._samples, self._seconds, self._began = 0, 0.0, time.perf_counter()
        return means, seconds, round(samples), rest

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


class Efficiency:
    """Counts FLOPs and device-hours on the host; never looks at the device between log steps.

    FLOPs are the model's, forward and backward; recomputed activations count once. Utilisation is relative to the peak
    of `precision`; fp32 uses the peak of TF32 if `torch.set_float32_matmul_precision` allows it.

    Args:
        steps, start: of the whole run, and those done before this process.
        device_seconds: of the resumed checkpoint.
    """

    def __init__(self, task: Task, precision: str, steps: int, start: int = 0, device_seconds: float = 0.0) -> None:
        self._task, self._device, self._world_size = task, task.world.device, task.world.size
        self._steps, self._start = steps, start
        self._peak = _peak(self._device, precision)
        self._flops = 0.0
        self._before, self._began = device_seconds, time.perf_counter()
        self._first_step_done: float | None = None

    def add(self, batch: Any) -> None:
        """Count a micro-batch of this process, after its work."""
        self._flops += self._task.sizes(batch)[1]
        if self._first_step_done is None:
            self._first_step_done = time.perf_counter()

    def read(self, step: int, seconds: float, samples: int) -> dict[str, float | None]:
        """Numbers after `step` steps, from the seconds of training and samples of all processes since the last call.

        Returns:
            <unit>_per_s, tokens_per_s: of all devices.
            tflops, mfu: TFLOP/s of the model on this device, and their share of its peak (None if that is unknown).
            memory_gb: peak that torch allocated since the last call; on the CPU resident memory, None if not known.
            gpu_hours: of all devices since the run began, earlier processes and pauses included.
            gpu_hours_projected: of the whole run, at this process's mean pace without its first step, which compiles.
        """
        rate, self._flops = self._flops / seconds, 0.0
        hours, tokens = self.device_seconds() / 3600, self._task.tokens(samples)
        counted, projected = step - self._start - 1, None
        if self._first_step_done is not None and counted >= 1:
            pace = (time.perf_counter() - self._first_step_done) / counted
            projected = hours + (self._steps - step) * pace * self._world_size / 3600
        return {
            f"{self._task.samples.unit}_per_s": samples / seconds,
            **({"tokens_per_s": tokens / seconds} if tokens else {}),
            **({"tflops": rate / 1e12, "mfu": rate / self._peak if self._peak else None} if rate else {}),
            "memory_gb": _memory_gb(self._device),
            "gpu_hours": hours,
            "gpu_hours_projected": projected,
        }

    def device_seconds(self) -> float:
        """Seconds of all devices together since the run began."""
        return self._before + (time.perf_counter() - self._began) * self._world_size


def _peak(device: torch.device, precision: str) -> float | None:
    if device.type != "cuda":
        return None
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    return peak_flops(torch.cuda.get_device_name(device), precision)


def _memory_gb(device: torch.device) -> float | None:
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most / 1e9
    statm = Path("/proc/self/statm")  # Linux; the second number is resident pages
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def paper_line() -> str:
    """The paper's runs in one line."""
    runs = (f"{r.name} {r.gpus} x {r.gpu} x {r.days:g} days = {r.gpu_hours:,.0f} GPU-hours" for r in PAPER_RUNS)
    return f"the paper's runs ({SOURCE}): {'; '.join(runs)}"

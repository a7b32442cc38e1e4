"""Throughput, FLOP utilisation, memory, device-hours of a run so far and projected; cost of the paper's runs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from fastmum.engine.gpus import PAPER_RUNS, SOURCE, peak_flops
from fastmum.engine.task import Task


class Efficiency:
    """Counts FLOPs and device-hours on the host; never looks at the device between log steps.

    FLOPs are the model's, forward and backward; recomputed activations count once. Durations are those of
    `time.perf_counter`: setting the clock does not change them.

    Args:
        task: knows the FLOPs of a batch.
        precision: bf16, fp32 or fp8, whose peak utilisation is relative to; fp32 uses the peak of TF32 if
            `torch.set_float32_matmul_precision` allows it.
        steps: of the whole run.
        start: steps done before this process.
        device_seconds: `state()["device_seconds"]` of the resumed checkpoint.
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
        """Numbers of a log step; counts again from zero.

        Args:
            step: steps done.
            seconds: of training since the last call, without pauses.
            samples: of all processes in them.

        Returns:
            <unit>_per_s, tokens_per_s: samples and tokens on all devices.
            tflops: of the model on this process's device, in TFLOP/s.
            mfu: their share of the device's peak; None if that is unknown.
            memory_gb: in GB of 10^9 bytes. CUDA: the most that torch allocated since the last call; CPU: resident
                memory of the process, None if the system does not report it.
            gpu_hours: of all devices since the run began, earlier processes and pauses included.
            gpu_hours_projected: of the whole run, at this process's mean pace without its first step, which compiles;
                None until there is a second step.
        """
        rate, self._flops = self._flops / seconds, 0.0
        hours = self._device_seconds() / 3600
        tokens = self._task.tokens(samples)
        return {
            f"{self._task.samples.unit}_per_s": samples / seconds,
            **({"tokens_per_s": tokens / seconds} if tokens else {}),
            **({"tflops": rate / 1e12, "mfu": rate / self._peak if self._peak else None} if rate else {}),
            "memory_gb": _memory_gb(self._device),
            "gpu_hours": hours,
            "gpu_hours_projected": self._projected(step, hours),
        }

    def state(self) -> dict[str, float]:
        """Seconds of all devices together, for a resumed run."""
        return {"device_seconds": self._device_seconds()}

    def _device_seconds(self) -> float:
        return self._before + (time.perf_counter() - self._began) * self._world_size

    def _projected(self, step: int, hours: float) -> float | None:
        counted = step - self._start - 1
        if self._first_step_done is None or counted < 1:
            return None
        pace = (time.perf_counter() - self._first_step_done) / counted
        return hours + (self._steps - step) * pace * self._world_size / 3600


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

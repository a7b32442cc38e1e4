"""What a step costs, and what the run will have cost at its end.

Legend: F frames, P patches of a frame, S frames of a sequence.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from fastmum.engine.gpus import peak_flops
from fastmum.engine.paper import paper_line
from fastmum.model.config import ModelConfig
from fastmum.model.flops import step_flops
from fastmum.model.masking import num_visible

__all__ = ["Cost", "paper_line"]


class Cost:
    """Counts what steps cost; between log steps a few additions, and never a look at the device.

    Operations are counted from the model and the lengths of the sequences (`fastmum.model.flops`), forward and
    backward; what `model.recompute` computes twice counts once. Time is that of `time.perf_counter`: a clock that is
    set does not change it.

    Args:
        model: sizes.
        image_size: side of a frame in pixels.
        mask_ratio: share of masked patches.
        device: that this process trains on.
        precision: train.precision: bf16, fp32 or fp8. Operations are held against the peak of that; fp32 against
            that of TF32 where `torch.set_float32_matmul_precision` allows it.
        steps: of the whole run.
        start: steps done before this process.
        world_size: devices of the run; a process on a CPU counts as one.
        device_seconds: `state()["device_seconds"]` of the checkpoint that the run goes on from; 0 for a new one.
    """

    def __init__(
        self,
        model: ModelConfig,
        image_size: int,
        mask_ratio: float,
        device: torch.device,
        precision: str,
        steps: int,
        start: int = 0,
        world_size: int = 1,
        device_seconds: float = 0.0,
    ) -> None:
        self._patches = (image_size // model.patch_size) ** 2
        visible = num_visible(self._patches, mask_ratio)
        # Operations are a F + b sum(S^2): two counts give both factors.
        one, two = (step_flops(model, self._patches, visible, [S]).total for S in (1, 2))
        self._per_square = (two - 2 * one) // 2
        self._per_frame = one - self._per_square
        self._device, self._world_size = device, world_size
        self._steps, self._start = steps, start
        self._peak = _peak(device, precision)
        self._frames = self._squares = 0
        self._before, self._began = device_seconds, time.perf_counter()
        self._first_step_done: float | None = None

    def add(self, lengths: Iterable[int]) -> None:
        """Count a batch of this process, after its work; a step of several batches calls it for each.

        Args:
            lengths: S of every sequence.
        """
        for S in lengths:
            self._frames += S
            self._squares += S * S
        if self._first_step_done is None:
            self._first_step_done = time.perf_counter()

    def read(self, step: int, seconds: float, frames: int) -> dict[str, float | None]:
        """The numbers of a log step; counts anew from here.

        Args:
            step: steps done.
            seconds: of training since the last call, without pauses.
            frames: that all processes computed in them.

        Returns:
            tokens_per_s: patches of all frames, masked or not, on all devices.
            tflops: of the model, in TFLOP/s of this process's device; with several devices, their batches may differ.
            mfu: their share of the device's peak; None where that is not known.
            memory_gb: in GB of 10^9 bytes. CUDA: most that torch had allocated since the last call; CPU: what the
                process has resident, None where the system does not say.
            gpu_hours: of all devices since the run began, earlier processes and pauses included.
            gpu_hours_projected: of the whole run, if the steps left take as long as this process's have taken on
                average, without its first one, which compiles; None until there is a second.
        """
        flops = self._per_frame * self._frames + self._per_square * self._squares
        rate = flops / seconds
        self._frames = self._squares = 0
        hours = self._device_seconds() / 3600
        return {
            "tokens_per_s": frames * self._patches / seconds,
            "tflops": rate / 1e12,
            "mfu": rate / self._peak if self._peak else None,
            "memory_gb": _memory_gb(self._device),
            "gpu_hours": hours,
            "gpu_hours_projected": self._projected(step, hours),
        }

    def state(self) -> dict[str, float]:
        """What a resumed run needs to go on counting: seconds of all devices together."""
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
    statm = Path("/proc/self/statm")  # Linux; the second number is of resident pages
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9

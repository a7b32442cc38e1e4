"""The device, its peaks, and times of calls."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

import torch

from benchmarks.duel import Run, interleave
from benchmarks.offline.gpus import GPUS, Gpu

OTHERS = {"pcie", "nvl", "40gb", "mig"}  # in names of boards with other peaks than the SXM ones
ROUNDS = 7  # of a measurement, each of 30 ms


def this_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def this_gpu() -> Gpu | None:
    """Peaks of the GPU, those that predictions use; None if it is not in their table."""
    return gpu_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def gpu_of(name: str) -> Gpu | None:
    """Peaks by the name that the driver reports; None for other boards than those of the table, and parts of them."""
    words = set(name.lower().replace("-", " ").split())
    return None if OTHERS & words else next((gpu for key, gpu in GPUS.items() if key in words), None)


def milliseconds(runs: Mapping[str, Run], rounds: int | None = None) -> dict[str, float]:
    """Median milliseconds of calls, in turn: on CUDA the GPU's, with a cold cache."""
    times = interleave(runs, rounds or ROUNDS, this_device())
    return {name: 1e3 * median(values) for name, values in times.items()}

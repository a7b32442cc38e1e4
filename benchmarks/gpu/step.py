"""The training step: time on the GPU and on the host, synchronisations, memory, recompilations.

96 frames of `mum_vitl16` cut into sequences in three ways, with the trainer's bound of 24 views, one after the other
in the same compiled code. Further words are settings.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

from benchmarks.duel import no_collection
from benchmarks.gpu.measure import this_device
from benchmarks.gpu.record import Record, stage_main
from benchmarks.step import make_problem, queued_steps

CUTS = {"8 x 12": (12,) * 8, "ragged": (24, 20, 16, 12, 10, 6, 4, 2, 2), "48 x 2": (2,) * 48}
SMALL_CUTS = {"2 x 4": (4, 4), "ragged": (5, 2, 1), "8 x 1": (1,) * 8}
SMALL = ["model.preset=mum_tiny", "model.depth=1", "model.decoder_depth=2", "data.image_size=32",
         "train.precision=fp32", "data.views=[1,8]"]  # fmt: skip
STEPS, SMALL_STEPS = 10, 2  # of each cut
SYNCHRONISES = "called a synchronizing"  # in torch's warning
HOST_STEPS = 5  # that are queued one at a time


@contextmanager
def counted_synchronisations(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """The warnings of operations that wait for the GPU, one each; none on a CPU."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            seen[:] = [warning for warning in seen if SYNCHRONISES in str(warning.message)]


def measure(record: Record, small: bool, words: list[str]) -> bool:
    """Rows for every cut; False if losses are not finite."""
    device, cuts, count = this_device(), (SMALL_CUTS if small else CUTS), (SMALL_STEPS if small else STEPS)
    frames = sum(next(iter(cuts.values())))
    settings = [f"train.device={device.type}", *(SMALL if small else ["data.views=[2,24]"]), *words]
    began = time.perf_counter()
    steps = dict(zip(cuts, queued_steps(make_problem(frames, frames, settings), list(cuts.values())), strict=True))
    losses, graphs = [], []
    for name, step in steps.items():
        losses.append(step(_ignore).item())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        record.row(first_step=name, seconds=time.perf_counter() - began, loss=losses[-1], graphs=graphs[-1])
        step(_ignore)  # CUDA graphs record the second call
    times = [measure_cut(record, name, step, device, count) for name, step in steps.items()]
    finite = all(loss == loss and abs(loss) < float("inf") for loss in losses)
    record.headline = (
        f"{' / '.join(f'{ms:.4g}' for ms, _ in times)} ms a step, {max(host for _, host in times):.3g} ms of the host, "
        f"{graphs[-1] - graphs[0]} recompilations" + ("" if finite else "; LOSSES ARE NOT FINITE")
    )
    return finite


def measure_cut(
    record: Record, name: str, step: Callable[..., Tensor], device: torch.device, count: int
) -> tuple[float, float]:
    """Milliseconds of a step when the queue is full, and of the host to queue one when it is empty."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with no_collection():
        with counted_synchronisations(device) as seen:
            began = time.perf_counter()
            if cuda:
                start.record()
            for _ in range(count):
                step(_ignore)
            if cuda:
                end.record()
            total = 1e3 * (time.perf_counter() - began)
        if cuda:
            torch.cuda.synchronize()
            total = start.elapsed_time(end)
        alone = []
        for _ in range(min(count, HOST_STEPS)):
            began = time.perf_counter()
            step(_ignore)
            alone.append(1e3 * (time.perf_counter() - began))
            if cuda:
                torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    record.row(cut=name, step_ms=total / count, host_ms=median(alone), syncs=len(seen) / count, memory_gb=memory)
    return total / count, median(alone)


def _ignore(phase: str) -> None:
    """End of a phase."""


if __name__ == "__main__":
    sys.exit(stage_main(__doc__, measure))

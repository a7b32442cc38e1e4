"""What a step computes on: this process's batches, each on its device before the one ahead of it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastmum.config import Config
from fastmum.data.loader import Batch, Loader
from fastmum.data.plan import StepPlan, StepPlanner
from fastmum.engine.distributed import DistContext
from fastmum.model.masking import seeded_noise


class StepBatch(NamedTuple):
    """A batch and what a step must know about it.

    Args:
        frames: (F, size, size, 3) uint8 on the device.
        lengths: frames of every sequence.
        noise: (F, P) float32 on the device, for the masks.
        views: (F,) int64 on the device, frames of the sequence that each belongs to.
        step_frames: of the whole step, on all processes; F / step_frames is this batch's share of the loss.
    """

    frames: Tensor
    lengths: tuple[int, ...]
    noise: Tensor
    views: Tensor
    step_frames: int

    def to(self, device: torch.device) -> StepBatch:
        """On a device; copies to a GPU start from pinned memory and are not waited for."""

        def move(x: Tensor) -> Tensor:
            pinned = x.pin_memory() if device.type == "cuda" and not x.is_cuda else x
            return pinned.to(device, non_blocking=True)

        return self._replace(frames=move(self.frames), noise=move(self.noise), views=move(self.views))


def noise_for(config: Config, seed: int, step: int, num_frames: int, part: int = 0) -> Tensor:
    """Mask noise (F, P) for the frames of a step's part, a pure function of its arguments."""
    patches = (config.data.image_size // config.model_config.patch_size) ** 2
    return seeded_noise(seed, part, step, num_frames, patches)


class Prefetcher:
    """Batches of steps in their order.

    The step is planned in parts of `data.frames_per_batch` frames, whatever the number of processes: each takes as many
    consecutive parts as it must, one after another. So a step has the same frames, in the same batches, on one process
    and on all numbers that divide its parts.

    Args:
        loader: decodes.
        planner: of as many ranks as a step has parts.
        world: of the processes; their number divides that of the parts.
        config: of the run.
    """

    def __init__(self, loader: Loader, planner: StepPlanner, world: DistContext, config: Config) -> None:
        self._loader, self._planner, self._world, self._config = loader, planner, world, config
        self.batches_per_step = planner.world_size // world.size
        first = world.rank * self.batches_per_step
        self._parts = range(first, first + self.batches_per_step)

    def batches(self, start: int, steps: int) -> Iterator[StepBatch]:
        """`batches_per_step` batches for every step from `start`, counted from 0."""
        with contextlib.closing(self._on_cpu(start, steps)) as batches:
            yield from _ahead(batches, self._world.device)

    def mixture(self, steps: range) -> dict[str, float]:
        """Share of frames of each data set in these steps, on all processes; steps are counted from 0."""
        manifests = self._planner.manifests
        counts = torch.zeros(len(manifests.datasets), dtype=torch.int64)
        for step in steps:
            for part in range(self._planner.world_size):
                rows = self._planner.plan(step, part).rows
                of = torch.from_numpy(manifests.dataset_of[manifests.sequence_of(rows)])
                counts += torch.bincount(of, minlength=len(counts))
        shares = (counts / counts.sum()).tolist()
        return {name: share for name, share in zip(manifests.datasets, shares, strict=True) if share}

    def _on_cpu(self, start: int, steps: int) -> Iterator[StepBatch]:
        places = ((step, part) for step in range(start, steps) for part in self._parts)
        with contextlib.closing(self._loader.batches(self._plans(start, steps))) as batches:
            for (step, part), batch in zip(places, batches, strict=True):
                yield self._described(batch, step, part)

    def _plans(self, start: int, steps: int) -> Iterator[StepPlan]:
        for step in range(start, steps):
            for part in self._parts:
                yield self._planner.plan(step, part)

    def _described(self, batch: Batch, step: int, part: int) -> StepBatch:
        lengths = torch.tensor(batch.lengths)
        noise = noise_for(self._config, self._config.run.seed, step, len(batch.frames), part)
        views = lengths.repeat_interleave(lengths)
        return StepBatch(batch.frames, batch.lengths, noise, views, self._planner.step_frames(step))


def _ahead(batches: Iterator[StepBatch], device: torch.device) -> Iterator[StepBatch]:
    """Copy the next batch to a GPU, on a stream of its own, while the work on the one before is queued."""
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    waiting: tuple[StepBatch, torch.cuda.Event] | None = None
    for batch in batches:
        if batch.frames.is_cuda:
            # DALI has decoded there, and its memory must not be held beyond the next batch.
            yield batch.to(device)
            continue
        with torch.cuda.stream(copies):
            moved = batch.to(device)
            done = torch.cuda.Event()
            done.record(copies)
        if waiting is not None:
            yield _arrived(*waiting, device)
        waiting = moved, done
    if waiting is not None:
        yield _arrived(*waiting, device)


def _arrived(batch: StepBatch, copied: torch.cuda.Event, device: torch.device) -> StepBatch:
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for tensor in (batch.frames, batch.noise, batch.views):
        tensor.record_stream(stream)  # allocated on the other one
    return batch

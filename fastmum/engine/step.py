"""A training step on the device: forward, backward, sums over devices, verdict, update. Nothing here waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmum.config import Config
from fastmum.engine.distributed import DistContext
from fastmum.engine.gradients import Gradients
from fastmum.engine.guard import NonFiniteGuard
from fastmum.engine.meter import Meter
from fastmum.engine.optimizer import Optimizer
from fastmum.engine.prefetcher import StepBatch
from fastmum.model.mum import MuM, MuMOutput


def forward(model: MuM, batch: StepBatch, config: Config) -> MuMOutput:
    """The model on one batch, in the precision of the run, with the loss of every frame."""
    with torch.autocast(batch.frames.device.type, torch.bfloat16, enabled=config.train.precision != "fp32"):
        # The same for all batches of training; the picture may show more views.
        max_views = max(config.data.views[1], *batch.lengths)
        return model(batch.frames, batch.lengths, config.model.mask_ratio, batch.noise, max_views, reduction="none")


class Step:
    """One optimiser step after another, each of one batch or several.

    The loss of a step is the mean over the masked patches of all its batches on all processes. Every frame has as many
    of them, so a batch's part of it is the sum over its frames divided by the frames of the step.

    Args:
        model: compiled or not.
        optimizer, gradients: of its parameters.
        guard, meter: get the loss of every step.
        world: of the processes.
        config: of the run.

    Attributes:
        norm: 0-d on the device, of the gradient of the last step.
    """

    def __init__(
        self, model: MuM, optimizer: Optimizer, gradients: Gradients, guard: NonFiniteGuard, meter: Meter,
        world: DistContext, config: Config,
    ) -> None:  # fmt: skip
        self._model, self._optimizer, self._gradients = model, optimizer, gradients
        self._guard, self._meter, self._world, self._config = guard, meter, world, config
        self._graphs = config.train.cuda_graphs
        self._begin()

    def _begin(self) -> None:
        self._loss = torch.zeros((), device=self._world.device)
        self._totals: Tensor | float = 0.0
        self._frames = 0

    def accumulate(self, batch: StepBatch, last: bool) -> None:
        """Add the gradient of one of the step's batches; `last`: there is no other."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self._gradients.next_batch(last)
        losses = forward(self._model, batch, self._config).loss
        part = losses.sum() / batch.step_frames
        self._loss += part.detach()
        self._totals = self._totals + self._meter.totals_of(losses, batch.views)
        self._frames = batch.step_frames
        under_way = self._world.sum_(self._loss, wait=False) if last else None  # beside the backward pass
        part.backward()
        if under_way is not None:
            under_way.wait()

    def update(self, step: int, rate: float) -> None:
        """Update the weights with the gradients of all batches, unless loss or gradient are not finite.

        Args:
            step: its number, counted from 1.
            rate: the learning rate.
        """
        self._gradients.finish()
        self.norm = self._gradients.norm()
        found_inf = self._guard.judge(step, self._loss, self.norm)
        self._optimizer.step(rate, self._gradients.of, found_inf)
        self._gradients.clear()
        self._meter.add(self._totals, found_inf, self._frames)
        self._begin()

"""An optimizer step on the device: forward, backward, reduction, check, clipping, update. Nothing here waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmum.engine.device import autocast
from fastmum.engine.ema import Ema
from fastmum.engine.gradients import Gradients
from fastmum.engine.guard import NonFiniteGuard
from fastmum.engine.meter import Meter
from fastmum.engine.optimizer import Optimizer
from fastmum.engine.task import ParamGroup, Task


class Step:
    """Optimizer steps, each of one or more micro-batches.

    Args:
        task: computes the loss.
        model: compiled or not.
        groups: of its parameters.
        optimizer, gradients: of the same groups.
        guard, meter: get the loss of every step.
        ema: averages of the weights, or None.
        precision: bf16, fp32 or fp8.

    Attributes:
        norms: names and 0-d norms on the device of the last step's gradient, before clipping: `grad_norm` of all, and
            `grad_norm/<group>` if there are several groups.
    """

    def __init__(
        self, task: Task, model: nn.Module, groups: Sequence[ParamGroup], optimizer: Optimizer, gradients: Gradients,
        guard: NonFiniteGuard, meter: Meter, ema: Ema | None = None, precision: str = "fp32",
    ) -> None:  # fmt: skip
        self._task, self._model, self._groups = task, model, groups
        self._optimizer, self._gradients, self._ema = optimizer, gradients, ema
        self._guard, self._meter, self._precision = guard, meter, precision
        self._world, self._graphs = task.world, task.config.train.cuda_graphs
        self.norms: dict[str, Tensor] = {}
        self._begin()

    def _begin(self) -> None:
        self._loss = torch.zeros(2, device=self._world.device)  # loss or its sum, weight if not known beforehand
        self._known_weight = True
        self._totals: Tensor | None = None
        self._samples = 0

    def accumulate(self, batch: Any, last: bool) -> None:
        """Forward and backward of a micro-batch; `last`: the step's last one."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self._gradients.next_batch(last)
        with autocast(self._world.device, self._precision):
            output = self._task.loss(self._model, batch)
        self._known_weight = output.step_weight is not None
        loss = output.loss_sum if output.step_weight is None else output.loss_sum / output.step_weight
        self._loss[0] += loss.detach()
        if not self._known_weight:
            self._loss[1] += output.weight
        totals = self._meter.totals_of(output)
        self._totals = totals if self._totals is None else self._totals + totals
        self._samples += self._task.sizes(batch)[0]
        reduction = self._world.sum_(self._loss, wait=False) if last else None  # during the backward pass
        loss.backward()
        if reduction is not None:
            reduction.wait()

    def update(self, step: int, rate: float) -> None:
        """Update the weights, unless loss or gradient are not finite.

        Args:
            step: its number, counted from 1.
            rate: the learning rate.
        """
        self._gradients.finish()
        loss, weight = self._loss.unbind()
        norms: list[Tensor] = self._gradients.norms()
        factors: list[Tensor | None] = [None] * len(norms)
        if not self._known_weight:
            loss = loss / weight
            factors = [1 / weight] * len(norms)
            norms = [norm / weight for norm in norms]
        total = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum().sqrt()
        found_inf = self._guard.check(step, loss, total)
        for i, group in enumerate(self._groups):
            if group.clip is not None:
                clip = (group.clip / (norms[i] + 1e-6)).clamp(max=1.0)
                factors[i] = clip if (factor := factors[i]) is None else clip * factor
        self._gradients.scale_(factors)
        self._optimizer.step(rate, self._gradients.of, found_inf)
        if self._ema is not None:
            self._ema.update(found_inf)
        self._gradients.clear()
        assert self._totals is not None
        self._meter.add(self._totals, found_inf, self._samples)
        self.norms = {"grad_norm": total}
        if len(norms) > 1:
            self.norms |= {f"grad_norm/{g.name}": norm for g, norm in zip(self._groups, norms, strict=True)}
        self._begin()

"""An optimizer step on the device: forward, backward, reduction, check, clipping, update. The host never waits for it.

Steps with a non-finite loss or gradient are skipped and counted on the device; too many in a row stop the run.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmum.config.schema import EngineConfig
from fastmum.engine.checkpoint import CheckpointError, Checkpoints, find_checkpoints, set_aside_after
from fastmum.engine.device import autocast
from fastmum.engine.gradients import Gradients
from fastmum.engine.meter import Meter
from fastmum.engine.optimizer import Ema, Optimizer
from fastmum.engine.rundir import RunDir
from fastmum.engine.task import ParamGroup, Task
from fastmum.errors import FastmumError, some_names


class TrainingError(FastmumError):
    """Training that cannot continue."""


class NonFiniteGuard:
    """Checks steps without a synchronisation.

    `counts` (4,) int64 on the device are the same on all processes: length of the current row of bad steps, bad steps
    in total, length of the longest row, last step of that row.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)

    def check(self, step: int, loss: Tensor, *norms: Tensor) -> Tensor:
        """found_inf of a step: 0-d float32 on the device, 1 if the (reduced, 0-d) loss or a norm is not finite."""
        finite = loss.isfinite()
        for norm in norms:
            finite = finite & norm.isfinite()
        bad = ~finite
        row, total, longest, end = self.counts.unbind()
        row = (row + 1) * bad
        end = torch.where(row > longest, step, end)
        self.counts.copy_(torch.stack([row, total + bad, torch.maximum(row, longest), end]))
        return bad.float()

    def uncount(self, steps: int) -> None:
        """Take back the last `steps`, which were skipped because they are void."""
        row, total, longest, end = self.counts.unbind()
        longest = torch.where(longest == row, longest - steps, longest)
        self.counts.copy_(torch.stack([row - steps, total - steps, longest, end]))

    def state(self) -> dict[str, Tensor]:
        """The live counts, to save and to fill in place."""
        return {"meter.bad_steps": self.counts}


def check_bad_steps(config: EngineConfig, run: RunDir, task: Task, checkpoints: Checkpoints, counts: list[int]) -> None:
    """Raise TrainingError after too many consecutive non-finite steps; checkpoints after the first are set aside."""
    _, _, longest, end = counts
    if longest <= config.train.max_bad_steps:
        return
    first = end - longest + 1
    with contextlib.suppress(CheckpointError):  # this error says more
        checkpoints.close()
    if task.world.is_main:
        set_aside_after(run.checkpoints, first - 1)
    task.world.wait()
    good = next((found.path for found in find_checkpoints(run.checkpoints)), None)
    raise TrainingError(
        f"loss or gradient was not finite in {longest} consecutive steps ({first} to {end}; train.max_bad_steps is "
        f"{config.train.max_bad_steps}), which were skipped; {task.describe_steps(range(first - 1, end))}. The last "
        f"good checkpoint is {good or 'none'}: the same command continues from it; a lower optim.base_lr (now "
        f"{config.optim.base_lr:g}) or train.precision=fp32 may help"
    )


class Step:
    """Optimizer steps, each of one or more micro-batches.

    `norms` has the 0-d norms on the device of the last step's gradient, before clipping: `grad_norm` of all, and
    `grad_norm/<group>` if there are several groups.
    """

    def __init__(
        self, task: Task, model: nn.Module, groups: Sequence[ParamGroup], optimizer: Optimizer, gradients: Gradients,
        guard: NonFiniteGuard, meter: Meter, ema: Ema | None = None, precision: str = "fp32",
    ) -> None:  # fmt: skip
        self._task, self._model, self._groups = task, model, groups
        self._optimizer, self._gradients, self._ema = optimizer, gradients, ema
        self._guard, self._meter, self._precision, self._world = guard, meter, precision, task.world
        self._buffers = [*task.buffers(model).values()]
        self._matrices = {w.parameter: w.name for w in optimizer.weights if w.matrices}
        self._before: list[Tensor] = []  # the buffers, before the step
        self.norms: dict[str, Tensor] = {}
        self._begin()

    def _begin(self) -> None:
        # Loss or its sum, and weight if not known beforehand.
        self._loss = torch.zeros(2, device=self._world.device)
        self._known_weight = True
        self._totals: Tensor | None = None
        self._samples = 0

    def accumulate(self, batch: Any, last: bool, void: bool = False) -> None:
        """Forward and backward of a micro-batch; `last`: the step's last one; `void`: the step is skipped."""
        if self._totals is None:
            self._before = [buffer.clone() for buffer in self._buffers]
        if void:
            self._loss[0] = torch.nan  # as a step that is not finite
        if self._task.config.train.cuda_graphs:
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
        """Update the weights at a learning rate; `step` counts from 1.

        If loss or gradient are not finite, weights and buffers stay as they were before the step. TrainingError: a
        matrix of Muon got no gradient; its momentum alone would move it at the full rate, however old it is.
        """
        self._gradients.finish()
        if self._matrices and (
            unused := [self._matrices[p] for p in self._gradients.without_gradient() if p in self._matrices]
        ):
            raise TrainingError(f"{some_names(unused)} got no gradient in step {step}, but Muon needs one: take adamw")
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
                norm = total if group.clip_all else norms[i]
                clip = (group.clip / (norm + 1e-6)).clamp(max=1.0)
                factors[i] = clip if (factor := factors[i]) is None else clip * factor
        self._gradients.scale_(factors)
        self._optimizer.step(rate, self._gradients.of, found_inf)
        self._world.mean_(self._buffers)  # those of each process; checkpoints have one
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(found_inf > 0, before, buffer))
        if self._ema is not None:
            self._ema.update(found_inf)
        self._gradients.clear()
        assert self._totals is not None
        self._meter.add(self._totals, found_inf, self._samples)
        self.norms = {"grad_norm": total}
        if len(norms) > 1:
            self.norms |= {f"grad_norm/{g.name}": norm for g, norm in zip(self._groups, norms, strict=True)}
        self._begin()

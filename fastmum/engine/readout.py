"""What a log step says: the one place where training waits for the device."""

from __future__ import annotations

from fastmum.data.loader import Loader
from fastmum.engine.bad_steps import BadSteps
from fastmum.engine.checkpoint import Checkpoints
from fastmum.engine.cost import Cost
from fastmum.engine.guard import NonFiniteGuard
from fastmum.engine.meter import Meter
from fastmum.engine.step import Step


class Readout:
    """Collects the numbers of a log step from those who count them.

    Args:
        step: knows the norm of the gradient.
        guard, meter, cost, loader, checkpoints: what their numbers say is said there.
        bad_steps: stops the run when there are too many.
    """

    def __init__(
        self, step: Step, guard: NonFiniteGuard, meter: Meter, cost: Cost, loader: Loader, checkpoints: Checkpoints,
        bad_steps: BadSteps,
    ) -> None:  # fmt: skip
        self._step, self._guard, self._meter, self._cost = step, guard, meter, cost
        self._loader, self._checkpoints, self._bad_steps = loader, checkpoints, bad_steps

    def values(self, done: int, rate: float) -> dict[str, float | None]:
        """By name; all processes call it together.

        Args:
            done: steps done.
            rate: learning rate of the last one.

        Raises:
            TrainingError: too many steps in a row were passed over.
        """
        values, seconds, frames, (norm, counts) = self._meter.read(self._step.norm, self._guard.counts)
        self._bad_steps.check(counts)
        faults = self._loader.faults.counts
        return values | {
            "lr": rate,
            "grad_norm": norm[0],
            "skipped_steps": int(counts[1]),
            **self._cost.read(done, seconds, frames),
            "checkpoint_stall_s": self._checkpoints.stall_seconds,
            "bad_frames": sum(faults.values()),
            **{f"bad_frames/{name}": count for name, count in faults.items()},
        }

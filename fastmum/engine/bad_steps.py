"""What becomes of a run with too many steps in a row whose loss or gradient is not finite."""

from __future__ import annotations

from collections.abc import Sequence

from fastmum.config import Config
from fastmum.engine.checkpoint import Checkpoints, find_checkpoints, set_aside_after
from fastmum.engine.distributed import DistContext
from fastmum.engine.prefetcher import Prefetcher
from fastmum.engine.rundir import RunDir


class TrainingError(RuntimeError):
    """Training that cannot go on; the message is one line for the user."""


class BadSteps:
    """Stops a run that learns nothing any more.

    Args:
        config, run, world: of the run.
        feed: knows what the frames were.
        checkpoints: the writer.
    """

    def __init__(
        self, config: Config, run: RunDir, world: DistContext, feed: Prefetcher, checkpoints: Checkpoints
    ) -> None:
        self._config, self._run, self._world = config, run, world
        self._feed, self._checkpoints = feed, checkpoints

    def check(self, counts: Sequence[float]) -> None:
        """Look at the counts of `NonFiniteGuard`, the same on all processes; checkpoints of bad steps are set aside.

        Raises:
            TrainingError: more than `train.max_bad_steps` in a row; with the steps, the data and the last good
                checkpoint.
        """
        longest, end, allowed = int(counts[2]), int(counts[3]), self._config.train.max_bad_steps
        if longest <= allowed:
            return
        first = end - longest + 1
        self._checkpoints.close()
        if self._world.is_main:
            set_aside_after(self._run.checkpoints, first - 1)
        self._world.wait()
        good = next((found.path for found in find_checkpoints(self._run.checkpoints)), None)
        shares = self._feed.mixture(range(first - 1, end))
        raise TrainingError(
            f"loss or gradient was not finite in {longest} steps in a row ({first} to {end}; train.max_bad_steps is "
            f"{allowed}), which were passed over; their frames are from "
            f"{', '.join(f'{name} {share:.0%}' for name, share in shares.items())}. The last good checkpoint is "
            f"{good or 'none'}: the same command goes on from there; a lower optim.base_lr (now "
            f"{self._config.optim.base_lr:g}) or train.precision=fp32 may help"
        )

"""Overhead of the training loop over forward, backward and update: `python -m benchmarks.loop [key.sub=value ...]`.

Runs the quickstart's model with `fastmum.train`. On a CPU, where calls end when their work is done, the rest of a step
is the loop's: data, non-finite check, norm, metrics, progress, garbage collection. Evaluation, pictures and checkpoints
happen only in the last step, which is not counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch

from fastmum.config import load_config
from fastmum.engine.muon import Muon
from fastmum.engine.optimizer import AdamW
from fastmum.errors import run_command
from fastmum.tasks.mum import MuMTask
from fastmum.train import train

STEPS, WARM_UP = 60, 10


class Stopwatch:
    """Sums up the time inside some functions, and marks the ends of steps."""

    def __init__(self) -> None:
        self.inside, self.ends = 0.0, list[tuple[float, float]]()

    def around(self, function: Callable[..., Any], ends_step: bool = False) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = perf_counter()
            result = function(*args, **kwargs)
            self.inside += perf_counter() - began
            if ends_step:
                self.ends.append((perf_counter(), self.inside))
            return result

        return timed

    def steps(self) -> list[tuple[float, float]]:
        """Seconds of every step after the warm-up: in total, and inside the functions."""
        pairs = zip(self.ends[WARM_UP:], self.ends[WARM_UP + 1 : -1], strict=False)
        return [(end[0] - start[0], end[1] - start[1]) for start, end in pairs]


def measure(overrides: Sequence[str], count: int = STEPS) -> list[tuple[float, float]]:
    """Train for `count` steps and time them; the first `WARM_UP` and the last are left out.

    Raises:
        ConfigError: invalid overrides.
    """
    watch, never = Stopwatch(), 100_000
    config = load_config("quickstart", [
        "data.scenes.count=4", f"train.steps={count}", "train.log_every=10", f"train.eval_every={never}",
        f"train.picture_every={never}", f"train.checkpoint_every={never}", "train.eval_batches=1", *overrides,
    ])  # fmt: skip
    optimizer = Muon if config.optim.optimizer == "muon" else AdamW
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(MuMTask, "loss", watch.around(MuMTask.loss)),
        patch.object(torch.Tensor, "backward", watch.around(torch.Tensor.backward)),
        patch.object(optimizer, "step", watch.around(optimizer.step, ends_step=True)),
    ):
        config.run.dir = f"{folder}/run"
        train(config)
    return watch.steps()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="a setting, as in training")
    args = parser.parse_args(argv)

    def command() -> None:
        steps = measure(args.settings)
        total, inside = median(s[0] for s in steps), median(s[1] for s in steps)
        share = median((s[0] - s[1]) / s[1] for s in steps)
        print(f"step {1e3 * total:.1f} ms, forward, backward and update {1e3 * inside:.1f} ms; overhead {share:.2%}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())

"""What the training loop costs beside forward, backward and update: `python -m benchmarks.loop [key.sub=value ...]`.

A run as users start it, on the embedded scenes, of the quickstart's model unless told otherwise. On a CPU, where calls
end when their work is done, the time of a step that is spent in none of the three is the loop's: data, verdict, norm,
metrics, progress, collector. Evaluation, pictures and checkpoints come once, at the end, and are not counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch

from fastmum.config import ConfigError, load_config
from fastmum.engine import step as training_step
from fastmum.engine.optimizer import AdamW
from fastmum.train import train

STEPS, WARM_UP = 60, 10


class Stopwatch:
    """Adds up the time that is spent in some functions, and notes when a step ends."""

    def __init__(self) -> None:
        self.inside, self.ends = 0.0, []

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
        """Of every step but the first ones: seconds in all, and in the functions."""
        pairs = zip(self.ends[WARM_UP:], self.ends[WARM_UP + 1 : -1], strict=False)
        return [(end[0] - start[0], end[1] - start[1]) for start, end in pairs]


def measure(words: Sequence[str], count: int = STEPS) -> list[tuple[float, float]]:
    """Train, and take the time of every step but the first and the last.

    Args:
        words: settings.
        count: of steps; the first `WARM_UP` are left out.

    Raises:
        ConfigError: words that are no settings.
    """
    watch, kept = Stopwatch(), (training_step.forward, torch.Tensor.backward, AdamW.step)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("configs/quickstart.yaml", [
            "data.scenes.count=4", f"train.steps={count}", "train.log_every=10", "train.eval_every=100000",
            "train.picture_every=100000", "train.checkpoint_every=100000", "train.eval_batches=1",
            f"run.dir={folder}/run", *words,
        ])  # fmt: skip
        training_step.forward, torch.Tensor.backward = watch.around(kept[0]), watch.around(kept[1])
        AdamW.step = watch.around(kept[2], ends_step=True)
        try:
            train(config)
        finally:
            training_step.forward, torch.Tensor.backward, AdamW.step = kept
    return watch.steps()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="a setting, as in training")
    try:
        steps = measure(parser.parse_args(argv).settings)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    whole, inside = median(s[0] for s in steps), median(s[1] for s in steps)
    share = median((s[0] - s[1]) / s[1] for s in steps)
    print(f"a step {1e3 * whole:.1f} ms, forward, backward and update {1e3 * inside:.1f} ms; the loop adds {share:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

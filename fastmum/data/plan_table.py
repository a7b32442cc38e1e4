"""Simulated throughput of the sampling modes for any number of ranks.

    python -m fastmum.data.plan_table

Assumes that a synchronous step takes as long as its costliest rank, and that a rank's time is proportional to the
floating-point operations of the model. The plans are the real ones; no time is measured.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from fastmum.data.packing import PAPER_FRAMES
from fastmum.data.plan import Catalogue, StepPlanner
from fastmum.errors import run_command
from fastmum.model.config import PRESETS, ModelConfig, step_flops

IMAGE_SIZE, VISIBLE = 256, 0.25  # pixels and share of patches that the encoder sees (supplement)
MODES = ("paper", "packed", "balanced")
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Row(NamedTuple):
    """One mode at one number of ranks, means over steps."""

    ranks: int
    mode: str
    fill: float  # share of the frames that a step could hold
    imbalance: float  # cost of attention, sum of S squared, of the costliest rank over the mean of the ranks
    speed: float  # frames per second relative to the paper's sampler


def operations(config: ModelConfig) -> tuple[float, float]:
    """FLOPs of a training step per frame, and per pair of frames of a sequence: S * first + S * S * second."""
    patches = (IMAGE_SIZE // config.patch_size) ** 2
    one, two = (step_flops(config, patches, int(patches * VISIBLE), [views]).total for views in (1, 2))
    return 2 * one - two / 2, two / 2 - one


def draw(planner: StepPlanner, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames and sum of S squared of every rank in every step, both (steps, ranks)."""
    lengths = [[planner.lengths(step, rank) for rank in range(planner.world_size)] for step in range(steps)]
    frames = np.array([[drawn.sum() for drawn in step] for step in lengths])
    return frames, np.array([[(drawn**2).sum() for drawn in step] for step in lengths])


def table(
    ranks: Iterable[int], steps: int, config: ModelConfig, frames_per_gpu: int = PAPER_FRAMES,
    views: tuple[int, int] = (2, 24), imagenet_share: float = 0.1,
) -> Iterator[Row]:  # fmt: skip
    """Rows for every number of ranks and every mode, the paper's first."""
    frame, pair = operations(config)
    longest = max(views[1], 2)
    sequences = Catalogue(("sequences", "images"), np.array([0, longest, longest + 1]), np.array([0, 1]))
    settings = sequences, None, frames_per_gpu, views, imagenet_share
    drawn = {mode: draw(StepPlanner(*settings, mode, world_size=max(ranks)), steps) for mode in MODES}
    for count in ranks:
        paper = None
        for mode in MODES:
            # The draws of a rank do not depend on the number of ranks.
            frames, squares = (values[:, :count] for values in drawn[mode])
            rate = float(frames.sum() / (frames * frame + squares * pair).max(axis=1).sum())
            paper = paper or rate
            imbalance = float((squares.max(axis=1) / squares.mean(axis=1)).mean())
            yield Row(count, mode, float(frames.mean()) / frames_per_gpu, imbalance, rate / paper)


def main(arguments: list[str] | None = None) -> int:
    """Print the table as Markdown; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastmum.data.plan_table", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="steps to draw (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="numbers of ranks (default: 1 to 256)")
    parser.add_argument("--frames-per-gpu", type=int, default=PAPER_FRAMES, help="default: %(default)s")
    parser.add_argument("--views", type=int, nargs=2, default=(2, 24), help="fewest and most (default: 2 24)")
    parser.add_argument("--imagenet-share", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--preset", choices=PRESETS, default="mum_vitl16", help="model (default: %(default)s)")
    args = parser.parse_args(arguments)

    def command() -> None:
        config, settings = PRESETS[args.preset], (args.frames_per_gpu, tuple(args.views), args.imagenet_share)
        rows = list(table(args.ranks, args.steps, config, *settings))
        frame, pair = (each / 1e9 for each in operations(config))
        print(f"A step: {frame:.1f} GFLOP per frame and {pair:.2f} per pair of frames of a sequence.\n")
        print("| ranks | mode | frames filled | attention, costliest rank / mean | frames/s, paper = 1 |")
        print("|---|---|---|---|---|")
        for row in rows:
            print(f"| {row.ranks} | {row.mode} | {row.fill:.1%} | {row.imbalance:.3f} | {row.speed:.3f} |")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())

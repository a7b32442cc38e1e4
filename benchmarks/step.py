"""The training step of the released model in plain PyTorch and of fastmum, by turns, phase by phase, on the CPU.

`python -m benchmarks.step --frames 8 --views 4 --rounds 5 [key.sub=value ...]`; the words are settings of fastmum.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.reference.model import ReferenceMuM
from benchmarks.reference.step import build_optimizer as build_reference_optimizer
from benchmarks.reference.step import train_step
from fastmum.config import Config, ConfigError, load_config
from fastmum.data.loader import Batch
from fastmum.model.mum import MuM
from fastmum.train import PRECISION, build_model
from fastmum.training.compile import compile_model
from fastmum.training.evaluation import forward, noise_for
from fastmum.training.optim import build_optimizer

PHASES = ("forward", "backward", "norm", "optimizer")
AGREEMENT = {"bf16": 1e-3, "fp32": 1e-4}  # largest relative difference of the losses of the first steps
PROFILED_OPERATORS = 25

Lap = Callable[[str], None]


class Contestant:
    """A training step and its times.

    Args:
        name: in the table.
        step: does a step, calls its argument with the name of every phase that ends, returns the loss.
    """

    def __init__(self, name: str, step: Callable[[Lap], float]) -> None:
        self.name = name
        self.rounds: list[dict[str, float]] = []  # seconds of every phase and of the "step"
        self._step = step

    def __call__(self) -> float:
        """Do a step and keep its times; returns the loss."""
        times: dict[str, float] = {}
        began = last = perf_counter()

        def lap(phase: str) -> None:
            nonlocal last
            now = perf_counter()
            times[phase] = now - last
            last = now

        loss = self._step(lap)
        self.rounds.append(times | {"step": perf_counter() - began})
        return loss

    def milliseconds(self, statistic: Callable[[list[float]], float]) -> dict[str, float]:
        """The statistic over the rounds, of every phase that the step has and of the whole step."""
        return {phase: 1e3 * statistic([times[phase] for times in self.rounds]) for phase in self.rounds[0]}


class Comparison:
    """Both on the same weights, frames and masks.

    Args:
        frames: F, frames of a step.
        views: S, frames of a sequence; divides F.
        settings: `key.sub=value` for fastmum; sizes, precision and mask ratio hold for both.

    Raises:
        ConfigError: as its one line says.
    """

    def __init__(self, frames: int, views: int, settings: Sequence[str] = ()) -> None:
        if min(frames, views) < 1 or frames % views:
            raise ConfigError(f"--frames is {frames}, but must be a positive multiple of --views, which is {views}")
        self.config = load_config(None, [f"data.frames_per_batch={frames}", f"data.views=[{views},{views}]", *settings])
        size = self.config.data.image_size
        torch.manual_seed(self.config.run.seed)
        pixels = torch.randint(0, 256, (frames, size, size, 3), dtype=torch.uint8)
        noise = noise_for(self.config, self.config.run.seed, 0, frames)
        model = build_model(self.config, torch.device("cpu"))
        self.reference = _reference(model.state_dict(), pixels, noise, views, self.config)
        self.fastmum = fastmum_steps(model, pixels, noise, [(views,) * (frames // views)], self.config)[0]

    def check(self) -> None:
        """Warm up with two steps of each, whose losses must agree: the second is that of updated weights.

        Raises:
            AssertionError: they do not.
        """
        bound = AGREEMENT[self.config.train.precision]
        for number in (1, 2):
            expected, loss = self.reference(), self.fastmum()
            if not abs(loss - expected) <= bound * abs(expected):
                raise AssertionError(f"loss of step {number}: reference {expected:.6f}, fastmum {loss:.6f}")
        self.reference.rounds.clear()
        self.fastmum.rounds.clear()

    def ratio(self, statistic: Callable[[list[float]], float] = median) -> float:
        """Time of the reference's step over fastmum's."""
        reference, fastmum = (x.milliseconds(statistic)["step"] for x in (self.reference, self.fastmum))
        return reference / fastmum

    def table(self) -> str:
        """Milliseconds of every phase, median and least of the rounds, and the ratios."""
        columns = (*PHASES, "step")
        lines = [f"{'ms':>18}" + "".join(f"{column:>11}" for column in columns)]
        for contestant in (self.reference, self.fastmum):
            for name, statistic in (("median", median), ("min", min)):
                times = contestant.milliseconds(statistic)
                cells = (f"{times[c]:11.0f}" if c in times else f"{'-':>11}" for c in columns)
                lines.append(f"{contestant.name:>11} {name:>6}" + "".join(cells))
        lines.append(f"reference / fastmum: {self.ratio():.2f} (medians), {self.ratio(min):.2f} (least)")
        return "\n".join(lines)


def _reference(state: dict[str, Tensor], pixels: Tensor, noise: Tensor, views: int, config: Config) -> Contestant:
    model = ReferenceMuM(**asdict(config.model_config))
    model.load_state_dict(state)
    optim = config.optim
    optimizer = build_reference_optimizer(model, optim.base_lr, optim.weight_decay, tuple(optim.betas))
    frames = pixels.permute(0, 3, 1, 2).unflatten(0, (-1, views)).contiguous()
    ratio, precision = config.model.mask_ratio, config.train.precision

    def step(lap: Lap) -> float:
        loss, _ = train_step(model, optimizer, frames, noise, ratio, precision, lap)
        return loss

    return Contestant("reference", step)


def fastmum_steps(
    model: MuM, pixels: Tensor, noise: Tensor, lengths: Sequence[tuple[int, ...]], config: Config
) -> list[Contestant]:
    """Steps as `fastmum.train` does them between two lines of its log, one for each way to cut the frames.

    They share the model and its optimiser. There is no norm to compute.
    """
    optimizer = build_optimizer(model, config.optim, PRECISION[config.train.precision])
    compile_model(model, config.model.compile, config.train.steps)
    for group in optimizer.param_groups:
        group["lr"] = config.optim.base_lr

    def contestant(batch: Batch) -> Contestant:
        def step(lap: Lap) -> float:
            loss = forward(model, batch, noise, config, pixels.device).loss
            lap("forward")
            loss.backward()
            lap("backward")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            lap("optimizer")
            return loss.item()

        return Contestant("fastmum", step)

    return [contestant(Batch(pixels, of_sequences)) for of_sequences in lengths]


def profile_step(contestant: Contestant) -> str:
    """The operators of one more step, by the time that they themselves took."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        contestant()
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=PROFILED_OPERATORS)
    return f"{contestant.name}\n{table}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=8, help="frames of a step (8)")
    parser.add_argument("--views", type=int, default=4, help="frames of a sequence (4)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each that are timed, after two to warm up (5)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write the operators of a step of each here")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="a setting, as in training")
    args = parser.parse_intermixed_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, but must be at least 1")
    try:
        comparison = Comparison(args.frames, args.views, args.settings)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    comparison.check()
    for _ in range(args.rounds):
        comparison.reference()
        comparison.fastmum()
    print(comparison.table())
    if args.profile:
        tables = [profile_step(contestant) for contestant in (comparison.reference, comparison.fastmum)]
        args.profile.write_text("\n".join(tables), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The training step of the released model in plain PyTorch, eager and compiled, and of fastmum, by turns, by phases.

`python -m benchmarks.step --frames 8 --views 4 --rounds 5 [key.sub=value ...]`; the words are settings of fastmum.
Frames and masks are on the device beforehand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.contestant import Apart, Contestant, Lap
from benchmarks.duel import no_collection, rotated
from benchmarks.reference.model import ReferenceMuM
from benchmarks.reference.step import build_optimizer as build_reference_optimizer
from benchmarks.reference.step import train_step
from benchmarks.results import COMPILED, FASTMUM, REFERENCE
from fastmum.config import Config, ConfigError, load_config
from fastmum.engine.device import pick_device, pick_precision
from fastmum.engine.distributed import DistContext, LaunchInfo
from fastmum.engine.gradients import Gradients
from fastmum.engine.guard import NonFiniteGuard
from fastmum.engine.memory import keep_freed_memory
from fastmum.engine.model import PRECISION, build_model
from fastmum.engine.optimizer import build_optimizer
from fastmum.engine.prefetcher import StepBatch, noise_for
from fastmum.engine.step import forward
from fastmum.model.compile import compile_model
from fastmum.model.mum import MuM

PHASES = ("forward", "backward", "norm", "optimizer")
AGREEMENT = {"bf16": 1e-3, "fp32": 1e-4}  # largest relative difference of the losses of the first steps


class Problem(NamedTuple):
    """What both are given.

    Args:
        config: with the sizes, the precision and the mask ratio.
        pixels: (F, H, W, 3) uint8.
        noise: (F, P), of the masks.
        model: its weights are those of both.
    """

    config: Config
    pixels: Tensor
    noise: Tensor
    model: MuM


class Comparison:
    """All on the same weights, frames and masks.

    On a CPU each has a process of its own, as what freed memory costs depends on who freed it. On a GPU they share one
    and torch's allocator, which keeps what was freed: else only one of them would find room for its activations.

    Args:
        frames: F, frames of a step.
        views: S, frames of a sequence; divides F.
        settings: `key.sub=value` for fastmum; device, sizes, precision and mask ratio hold for all.
        compiled: whether the compiled reference is there, too.

    Raises:
        ConfigError: as its one line says.
    """

    def __init__(self, frames: int, views: int, settings: Sequence[str] = (), compiled: bool = True) -> None:
        if min(frames, views) < 1 or frames % views:
            raise ConfigError(f"--frames is {frames}, but must be a positive multiple of --views, which is {views}")
        self.config = _config(frames, views, settings)
        apart = pick_device(self.config.train.device, LaunchInfo()).type == "cpu"
        self.contestants: dict[str, Contestant] = {}
        for name, build in BUILDERS.items():
            if compiled or name != COMPILED:
                args = frames, views, tuple(settings)
                self.contestants[name] = Apart(build, *args) if apart else build(*args)

    def close(self) -> None:
        """End the processes."""
        for contestant in self.contestants.values():
            contestant.close()

    def check(self) -> None:
        """Warm up with two steps of each, whose losses must agree: the second is that of updated weights.

        Raises:
            AssertionError: they do not.
        """
        bound = AGREEMENT[self.config.train.precision]
        for number in (1, 2):
            losses = {name: contestant() for name, contestant in self.contestants.items()}
            expected = losses[REFERENCE]
            for name, loss in losses.items():
                if not abs(loss - expected) <= bound * abs(expected):
                    raise AssertionError(f"loss of step {number}: reference {expected:.6f}, {name} {loss:.6f}")
        for contestant in self.contestants.values():
            contestant.rounds.clear()

    def run(self, rounds: int) -> None:
        """Time steps of each by turns."""
        with no_collection():
            for number in range(rounds):
                for name in rotated(list(self.contestants), number):
                    self.contestants[name]()

    def rounds(self, phase: str) -> dict[str, list[float]]:
        """Seconds of a phase, or of the whole "step", by contestant."""
        return {name: [times[phase] for times in c.rounds] for name, c in self.contestants.items()}

    def ratio(self, of: str, statistic: Callable[[list[float]], float] = median) -> float:
        """Time of another's step over fastmum's."""
        other, fastmum = (self.contestants[name].milliseconds(statistic)["step"] for name in (of, FASTMUM))
        return other / fastmum

    def table(self) -> str:
        """Milliseconds of every phase, median and least of the rounds, and the ratios."""
        columns = (*PHASES, "step")
        lines = [f"{'ms':>18}" + "".join(f"{column:>11}" for column in columns)]
        for contestant in self.contestants.values():
            for name, statistic in (("median", median), ("min", min)):
                times = contestant.milliseconds(statistic)
                cells = (f"{times[c]:11.0f}" if c in times else f"{'-':>11}" for c in columns)
                lines.append(f"{contestant.name:>11} {name:>6}" + "".join(cells))
        for name in self.contestants:
            if name != FASTMUM:
                lines.append(f"{name} / fastmum: {self.ratio(name):.2f} (medians), {self.ratio(name, min):.2f} (least)")
        return "\n".join(lines)


def _config(frames: int, views: int, settings: Sequence[str]) -> Config:
    config = load_config(None, [f"data.frames_per_batch={frames}", f"data.views=[{views},{views}]", *settings])
    config.train.precision = pick_precision(config.train.precision, pick_device(config.train.device, LaunchInfo()))
    return config


def make_problem(frames: int, views: int, settings: Sequence[str]) -> Problem:
    """The same for the same arguments."""
    config = _config(frames, views, settings)
    device, size = pick_device(config.train.device, LaunchInfo()), config.data.image_size
    torch.manual_seed(config.run.seed)
    pixels = torch.randint(0, 256, (frames, size, size, 3), dtype=torch.uint8).to(device)
    noise = noise_for(config, config.run.seed, 0, frames).to(device)
    return Problem(config, pixels, noise, build_model(config, DistContext(device=device)))


def build_reference(
    frames: int, views: int, settings: Sequence[str], compile_it: Callable[[nn.Module], nn.Module] | None = None
) -> Contestant:
    """The step of the released model in plain PyTorch."""
    config, pixels, noise, ours = make_problem(frames, views, settings)
    model = ReferenceMuM(**asdict(config.model_config)).to(pixels.device)
    model.load_state_dict(ours.state_dict())
    del ours
    optim = config.optim
    optimizer = build_reference_optimizer(model, optim.base_lr, optim.weight_decay, tuple(optim.betas))
    model = compile_it(model) if compile_it else model
    images = pixels.permute(0, 3, 1, 2).unflatten(0, (-1, views)).contiguous()
    ratio, precision = config.model.mask_ratio, config.train.precision

    def step(lap: Lap) -> float:
        loss, _ = train_step(model, optimizer, images, noise, ratio, precision, lap)
        return loss

    return Contestant(COMPILED if compile_it else REFERENCE, step, pixels.device)


def build_compiled(frames: int, views: int, settings: Sequence[str]) -> Contestant:
    """The same, its model compiled as a whole by `torch.compile`."""
    return build_reference(frames, views, settings, torch.compile)


def build_fastmum(frames: int, views: int, settings: Sequence[str]) -> Contestant:
    """The step of fastmum on sequences of equal length."""
    problem = make_problem(frames, views, settings)
    return fastmum_steps(problem, [(views,) * (frames // views)])[0]


def fastmum_steps(problem: Problem, lengths: Sequence[tuple[int, ...]]) -> list[Contestant]:
    """Steps as `fastmum.train` does them between two lines of its log, one for each way to cut the frames.

    They share the model and its optimiser.
    """
    config, pixels, noise, model = problem
    keep_freed_memory()
    optimizer = build_optimizer(model, config.optim, PRECISION[config.train.precision])
    compile_model(model, config.model.compile, config.train.steps, cuda_graphs=config.train.cuda_graphs)
    gradients, guard = Gradients(model.parameters(), DistContext(device=pixels.device)), NonFiniteGuard(pixels.device)

    def contestant(of_sequences: tuple[int, ...]) -> Contestant:
        views = torch.tensor(of_sequences).repeat_interleave(torch.tensor(of_sequences)).to(pixels.device)
        batch = StepBatch(pixels, of_sequences, noise, views, len(pixels))

        def step(lap: Lap) -> float:
            if config.train.cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            loss = forward(model, batch, config).loss.sum() / batch.step_frames
            lap("forward")
            loss.backward()
            lap("backward")
            found_inf = guard.judge(1, loss.detach(), gradients.norm())
            lap("norm")
            optimizer.step(config.optim.base_lr, gradients.of, found_inf)
            gradients.clear()
            lap("optimizer")
            return loss.item()

        return Contestant(FASTMUM, step, pixels.device)

    return [contestant(of_sequences) for of_sequences in lengths]


BUILDERS = {REFERENCE: build_reference, COMPILED: build_compiled, FASTMUM: build_fastmum}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=8, help="frames of a step (8)")
    parser.add_argument("--views", type=int, default=4, help="frames of a sequence (4)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each that are timed, after two to warm up (5)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write the operators of a step of each here")
    parser.add_argument("--eager-only", action="store_true", help="do not compile the reference, which takes a minute")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="a setting, as in training")
    args = parser.parse_intermixed_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, but must be at least 1")
    try:
        comparison = Comparison(args.frames, args.views, args.settings, compiled=not args.eager_only)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        comparison.check()
        comparison.run(args.rounds)
        print(comparison.table())
        if args.profile:
            tables = [contestant.profile() for contestant in comparison.contestants.values()]
            args.profile.write_text("\n".join(tables), encoding="utf-8")
    except AssertionError as error:
        print(f"error: they disagree, so there is nothing to time: {error}", file=sys.stderr)
        return 2
    finally:
        comparison.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

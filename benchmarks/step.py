"""Training step of the released model in plain PyTorch, eager and compiled, and of fastmum, timed in turn by phases.

`python -m benchmarks.step --frames 8 --views 4 --rounds 5 [key.sub=value ...]`, with settings of fastmum. Frames and
masks are on the device beforehand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.contestant import Contestant, Lap, RemoteContestant
from benchmarks.duel import no_collection, rotated
from benchmarks.reference.model import ReferenceMuM
from benchmarks.reference.step import build_optimizer as build_reference_optimizer
from benchmarks.reference.step import train_step
from benchmarks.results import COMPILED, FASTMUM, REFERENCE
from fastmum.config import ConfigError, load_config
from fastmum.config.mum import Config
from fastmum.engine.device import MATRIX_DTYPE, autocast, keep_freed_memory, pick_device, pick_precision
from fastmum.engine.distributed import DistContext, LaunchInfo
from fastmum.engine.gradients import Gradients
from fastmum.engine.optimizer import build_optimizer
from fastmum.engine.step import NonFiniteGuard
from fastmum.errors import FastmumError, run_command
from fastmum.model.inputs import seeded_noise
from fastmum.model.mum import MuM
from fastmum.tasks.mum import MuMBatch, MuMTask

PHASES = ("forward", "backward", "norm", "optimizer")
AGREEMENT = {"bf16": 1e-3, "fp32": 1e-4}  # largest relative difference of the losses of the first steps


class DisagreementError(FastmumError):
    """The losses of the contestants differ."""


class Problem(NamedTuple):
    """The same for all contestants.

    Args:
        task: with the configuration.
        pixels: (F, H, W, 3) uint8.
        noise: (F, P), for the masks.
        model: has the initial weights.
    """

    task: MuMTask
    pixels: Tensor
    noise: Tensor
    model: MuM


class Comparison:
    """Contestants with the same weights, frames and masks.

    On a CPU each has a separate process, because the cost of memory depends on what was freed before. On a GPU they
    share one process and torch's allocator, which keeps freed memory.

    Args:
        frames: F, frames of a step.
        views: S, frames of a sequence; divides F.
        settings: `key.sub=value` for fastmum; device, sizes, precision and mask ratio hold for all.
        compiled: whether to include the compiled reference.

    Raises:
        ConfigError: invalid settings.
    """

    agreement = AGREEMENT

    def __init__(self, frames: int, views: int, settings: Sequence[str] = (), compiled: bool = True) -> None:
        if min(frames, views) < 1 or frames % views:
            raise ConfigError(f"--frames is {frames}, but must be a positive multiple of --views, which is {views}")
        self.config = _config(frames, views, settings)
        remote = pick_device(self.config.train.device, LaunchInfo()).type == "cpu"
        self.contestants: dict[str, Contestant] = {}
        for name, build in BUILDERS.items():
            if compiled or name != COMPILED:
                args = frames, views, tuple(settings)
                self.contestants[name] = RemoteContestant(build, *args) if remote else build(*args)

    def close(self) -> None:
        """End the processes."""
        for contestant in self.contestants.values():
            contestant.close()

    def check(self) -> None:
        """Warm up with two steps of each and compare their losses; the second uses updated weights.

        Raises:
            DisagreementError: losses differ.
        """
        bound = self.agreement[self.config.train.precision]
        for number in (1, 2):
            losses = {name: contestant() for name, contestant in self.contestants.items()}
            expected = losses[REFERENCE]
            for name, loss in losses.items():
                if not abs(loss - expected) <= bound * abs(expected):
                    raise DisagreementError(f"loss of step {number}: reference {expected:.6f}, {name} {loss:.6f}")
        for contestant in self.contestants.values():
            contestant.rounds.clear()

    def run(self, rounds: int) -> None:
        """Time steps of each in turn."""
        with no_collection():
            for number in range(rounds):
                for name in rotated(list(self.contestants), number):
                    self.contestants[name]()

    def report(self, rounds: int) -> None:
        """Print the table of some rounds, unless `check` finds that the contestants disagree."""
        self.check()
        self.run(rounds)
        print(self.table())

    def rounds(self, phase: str) -> dict[str, list[float]]:
        """Seconds of a phase, or of the whole "step", by contestant."""
        return {name: [times[phase] for times in c.rounds] for name, c in self.contestants.items()}

    def table(self) -> str:
        """Milliseconds of every phase, median and minimum of the rounds, and the ratios."""
        columns = (*PHASES, "step")
        lines = [f"{'ms':>18}" + "".join(f"{column:>11}" for column in columns)]
        steps: dict[str, list[float]] = {}
        for contestant in self.contestants.values():
            for name, statistic in (("median", median), ("min", min)):
                times = contestant.milliseconds(statistic)
                cells = (f"{times[c]:11.0f}" if c in times else f"{'-':>11}" for c in columns)
                lines.append(f"{contestant.name:>11} {name:>6}" + "".join(cells))
                steps.setdefault(contestant.name, []).append(times["step"])
        for name in self.contestants:
            if name != FASTMUM:
                medians, minima = (other / ours for other, ours in zip(steps[name], steps[FASTMUM], strict=True))
                lines.append(f"{name} / fastmum: {medians:.2f} (medians), {minima:.2f} (minima)")
        return "\n".join(lines)


def _config(frames: int, views: int, settings: Sequence[str]) -> Config:
    config = load_config(None, [f"data.frames_per_batch={frames}", f"data.views=[{views},{views}]", *settings], Config)
    config.train.precision = pick_precision(config.train.precision, pick_device(config.train.device, LaunchInfo()))
    return config


def make_problem(frames: int, views: int, settings: Sequence[str]) -> Problem:
    """Equal arguments give equal problems."""
    config = _config(frames, views, settings)
    device, size = pick_device(config.train.device, LaunchInfo()), config.data.image_size
    torch.manual_seed(config.run.seed)
    pixels = torch.randint(0, 256, (frames, size, size, 3), dtype=torch.uint8).to(device)
    noise = seeded_noise(config.run.seed, 0, 0, frames, (size // config.model_config.patch_size) ** 2).to(device)
    task = MuMTask(config, DistContext(device=device))
    return Problem(task, pixels, noise, task.build())


def build_reference(
    frames: int, views: int, settings: Sequence[str], compile_it: Callable[[nn.Module], nn.Module] | None = None
) -> Contestant:
    """A step of the released model in plain PyTorch."""
    task, pixels, noise, ours = make_problem(frames, views, settings)
    config = task.config
    model: nn.Module = ReferenceMuM(**asdict(config.model_config)).to(pixels.device)
    model.load_state_dict(ours.state_dict())
    del ours
    optim = config.optim
    fused = True if compile_it and pixels.is_cuda else None  # who compiles also asks for the faster optimizer
    optimizer = build_reference_optimizer(model, optim.base_lr, optim.weight_decay, tuple(optim.betas), fused)
    model = compile_it(model) if compile_it else model
    images = pixels.permute(0, 3, 1, 2).unflatten(0, (-1, views)).contiguous()
    ratio, precision = config.model.mask_ratio, config.train.precision

    def step(lap: Lap) -> float:
        return train_step(model, optimizer, images, noise, ratio, precision, lap)[0]

    return Contestant(COMPILED if compile_it else REFERENCE, step, pixels.device)


def build_compiled(frames: int, views: int, settings: Sequence[str]) -> Contestant:
    """The same, with the whole model in `torch.compile`."""
    return build_reference(frames, views, settings, torch.compile)


def build_fastmum(frames: int, views: int, settings: Sequence[str]) -> Contestant:
    """A step of fastmum on sequences of equal length."""
    return fastmum_steps(make_problem(frames, views, settings), [(views,) * (frames // views)])[0]


def fastmum_steps(problem: Problem, lengths: Sequence[tuple[int, ...]]) -> list[Contestant]:
    """Steps as in `fastmum.engine.step`, one for each way to cut the frames into sequences.

    They share the model and its optimizer.
    """
    device = problem.pixels.device
    return [
        Contestant(FASTMUM, lambda lap, queue=queue: queue(lap).item(), device)
        for queue in queued_steps(problem, lengths)
    ]


def queued_steps(problem: Problem, lengths: Sequence[tuple[int, ...]]) -> list[Callable[[Lap], Tensor]]:
    """The same as functions that queue a step on the device and return its loss without a synchronisation."""
    task, pixels, noise, model = problem
    config, precision = task.config, task.config.train.precision
    keep_freed_memory()
    groups = task.groups(model)
    optimizer = build_optimizer(model, config.optim, MATRIX_DTYPE[precision], groups, task.matrices(model), task.world)
    task.compile(model, config.train.steps)
    gradients, guard = Gradients(groups, task.world), NonFiniteGuard(pixels.device)

    def queue(batch: MuMBatch, lap: Lap) -> Tensor:
        if config.train.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(pixels.device, precision):
            loss = task.loss(model, batch).loss_sum / batch.step_frames
        lap("forward")
        loss.backward()
        lap("backward")
        found_inf = guard.check(1, loss.detach(), *gradients.norms())
        lap("norm")
        optimizer.step(config.optim.base_lr, gradients.of, found_inf)
        gradients.clear()
        lap("optimizer")
        return loss.detach()

    def batch_of(lengths: tuple[int, ...]) -> MuMBatch:
        views = torch.tensor(lengths)
        return MuMBatch(pixels, lengths, noise, views.repeat_interleave(views).to(pixels.device), len(pixels))

    return [partial(queue, batch_of(some)) for some in lengths]


BUILDERS: dict[str, Callable[..., Contestant]] = {
    REFERENCE: build_reference,
    COMPILED: build_compiled,
    FASTMUM: build_fastmum,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=8, help="frames of a step (8)")
    parser.add_argument("--views", type=int, default=4, help="frames of a sequence (4)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each, after two to warm up (5)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write the operators of a step of each to FILE")
    parser.add_argument("--eager-only", action="store_true", help="omit the compiled reference, which takes a minute")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="a setting, as in training")
    args = parser.parse_intermixed_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, but must be at least 1")

    def command() -> None:
        with closing(Comparison(args.frames, args.views, args.settings, compiled=not args.eager_only)) as comparison:
            comparison.report(args.rounds)
            if args.profile:
                tables = [contestant.profile() for contestant in comparison.contestants.values()]
                args.profile.write_text("\n".join(tables), encoding="utf-8")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())

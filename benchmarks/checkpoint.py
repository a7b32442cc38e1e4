"""Cost of checkpoints for training on the CPU, in the background and not, and the time to verify and load them.

`python -m benchmarks.checkpoint --preset mum_vitl16 --frames 1 --rounds 3`; the full size needs 14 GB of memory and
3 x 4.7 GB of disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from fastmum import PRESETS, MuM
from fastmum.engine.checkpoint import Checkpoints, find_checkpoints, load_checkpoint
from fastmum.engine.checkpoint.shards import file_damage
from fastmum.engine.memory import keep_freed_memory


class Training:
    """Steps of a model on random frames: float32, fused AdamW.

    Args:
        preset: of the model.
        frames: per step, one sequence.
    """

    def __init__(self, preset: str, frames: int) -> None:
        torch.manual_seed(0)
        self.config = PRESETS[preset]
        self._model = MuM(self.config)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5, fused=True)
        self._pixels = torch.randint(0, 256, (frames, 256, 256, 3), dtype=torch.uint8)
        self._lengths = [frames]

    def step(self, before_update: Callable[[], None]) -> float:
        """Seconds of one step, including waits."""
        began = perf_counter()
        self._model(self._pixels, self._lengths).loss.backward()
        before_update()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return perf_counter() - began

    def state(self) -> dict[str, Tensor]:
        """Live weights and moments."""
        state = {f"model.{name}": tensor for name, tensor in self._model.state_dict(keep_vars=True).items()}
        for name, parameter in self._model.named_parameters():
            moments = self._optimizer.state[parameter]
            state |= {f"{kind}.{name}": moments[kind] for kind in ("exp_avg", "exp_avg_sq")}
        return state


class Cost(NamedTuple):
    """Seconds of one checkpoint.

    Args:
        stall: that training waited.
        steps: of each step meanwhile, without the wait.
        total: from `save` until it was published.
    """

    stall: float
    steps: list[float]
    total: float


def write(training: Training, checkpoints: Checkpoints, step: int) -> Cost:
    """Write a checkpoint and train meanwhile."""
    began, stalled, before = perf_counter(), checkpoints.stall_seconds, checkpoints.newest
    checkpoints.save(step, training.state(), {"model_config": dataclasses.asdict(training.config)})
    steps = []
    while checkpoints.newest == before and not checkpoints.failed:
        waited = checkpoints.stall_seconds
        seconds = training.step(checkpoints.before_update)
        steps.append(seconds - (checkpoints.stall_seconds - waited))
    total = perf_counter() - began
    checkpoints.wait()
    return Cost(checkpoints.stall_seconds - stalled, steps, total)


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Append the seconds of a block."""
    began = perf_counter()
    yield
    seconds.append(perf_counter() - began)


def report(training: Training, folder: Path, rounds: int) -> Iterator[str]:
    """Measure; yields the lines of a table."""
    number = 0

    def quiet() -> float:
        return training.step(lambda: None)

    quiet()
    steps = [quiet() for _ in range(rounds)]
    yield f"step without a checkpoint        {_spread(steps)}"
    usual = median(steps)
    for background in (True, False):
        checkpoints = Checkpoints(folder, keep=1, background=background)
        with timed(prepare := []):
            checkpoints.prepare(training.state())
        costs = [write(training, checkpoints, number := number + 1) for _ in range(rounds)]
        stalls = [cost.stall for cost in costs]
        yield f"background={background}"
        yield f"  training waits                 {_spread(stalls)}, {median(stalls) / usual:.1%} of a step"
        yield f"  memory allocated before        {_spread(prepare)}"
        yield f"  save until published           {_spread([cost.total for cost in costs])}"
        if background:
            meanwhile = [seconds for cost in costs for seconds in cost.steps]
            yield f"  steps meanwhile                {_spread(meanwhile)}, {median(meanwhile) / usual - 1:+.0%}"
        steps += [quiet() for _ in range(rounds)]
    yield f"step without, whole run          {_spread(steps)}"
    state, config = training.state(), dataclasses.asdict(training.config)
    manifest = find_checkpoints(folder)[0].manifest
    del checkpoints
    gc.collect()
    verify: list[float] = []
    load: list[float] = []
    for _ in range(rounds):
        with timed(verify):
            assert not any(file_damage(manifest.path / name, file) for name, file in manifest.files.items())
        with timed(load):
            load_checkpoint(folder, state, config)
    size = sum(file.size for file in manifest.files.values())
    yield f"verify {size / 1e9:.2f} GB                   {_spread(verify)}"
    yield f"verify and load                  {_spread(load)}"


def _spread(seconds: Sequence[float]) -> str:
    return f"{median(seconds):8.3f} s ({min(seconds):.3f} to {max(seconds):.3f}, {len(seconds)} times)"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="mum_vitl16", help="sizes of the model (%(default)s)")
    parser.add_argument("--frames", type=int, default=1, help="frames of a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="checkpoints of each kind (%(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (torch's default)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (the system's temporary folder)")
    args = parser.parse_args(argv)
    for name in ("frames", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, but must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for line in report(Training(args.preset, args.frames), Path(folder), args.rounds):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

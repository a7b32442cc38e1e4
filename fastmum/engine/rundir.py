"""The folder of a run: paths, lines of metrics.jsonl, and the start of a run from a checkpoint in it."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastmum.config.schema import ConfigError, EngineConfig
from fastmum.engine.checkpoint import load_checkpoint, load_newest
from fastmum.engine.distributed import DistContext
from fastmum.engine.task import Samples, Task

log = logging.getLogger(__name__)


class RunDir:
    """Paths of the files that a run writes into the folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"  # resolved
        self.metrics = root / "metrics.jsonl"  # one JSON object per log step
        self.bad_frames = root / "bad_frames.log"  # a line per frame that cannot be decoded
        self.checkpoints = root / "checkpoints"
        self.tensorboard = root / "tensorboard"
        self.wandb_id = root / "wandb_id"  # id of the run in Weights & Biases
        self.profile = root / "profile"  # traces of `profile.steps`
        self.newest_picture = root / "reconstruction.png"

    def picture(self, step: int, name: str = "reconstruction") -> Path:
        """A picture after `step` steps; the name of reconstructions is left out."""
        prefix = "step" if name == "reconstruction" else name
        return self.root / "pictures" / f"{prefix}_{step:07d}.png"

    def set_aside(self) -> None:
        """Rename the folder, if it holds a run, to the next free `<name>.old-<n>`."""
        if not self.config.exists():
            return
        names = (self.root.with_name(f"{self.root.name}.old-{number}") for number in itertools.count(1))
        old = next(name for name in names if not name.exists())
        self.root.rename(old)
        log.info("the run in %s was renamed to %s", self.root, old)


def metrics_line(step: int, values: Mapping[str, float | None]) -> bytes:
    """A line of strict JSON: non-finite values are null."""
    content = {"step": step, **{name: finite(value) for name, value in values.items()}}
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def finite(value: float | None) -> float | None:
    """The value as a Python number, None if it is not finite."""
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last line cut short by a crash; none if the file is missing."""
    return [record for _, record in _records(path)]


def end_of_step(path: Path, step: int) -> int:
    """Offset in bytes after the lines of the first `step` steps."""
    return max((end for end, record in _records(path) if record["step"] <= step), default=0)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines, each with the offset of its end."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # also of bytes that are not UTF-8
            return
        if not line.endswith(b"\n"):
            return
        end += len(line)
        yield end, record


class ResumeState(NamedTuple):
    """Where a run starts: steps done, samples per step and seconds of all devices, whether the state was loaded."""

    step: int
    samples_per_step: int
    device_seconds: float
    resumed: bool


def resume(config: EngineConfig, run: RunDir, task: Task, state: Mapping[str, Any]) -> ResumeState:
    """Do what `train.resume` says; `state` is then that of the checkpoint.

    CheckpointError: no checkpoint fits. ConfigError: the number of processes does not divide the samples of a step.
    """
    world, manifest, sizes = task.world, None, task.manifest()
    match config.train.resume:
        case "never":
            if world.is_main:
                run.set_aside()
            world.wait()
        case "auto":
            manifest = load_newest(run.checkpoints, state, sizes, world.control)
        case "latest":
            manifest = load_checkpoint(run.checkpoints, state, sizes, world.control)
        case path:
            manifest = load_checkpoint(Path(path).expanduser(), state, sizes, world.control)
    if manifest is None:
        return ResumeState(0, _samples_per_step(task.samples, world, None), 0.0, resumed=False)
    values = manifest.values
    before = values["strategy"], values["world_size"]
    log.info("resumed from %s at step %d (%s, %d processes)", manifest.path, manifest.step, *before)
    samples = _samples_per_step(task.samples, world, values["samples_per_step"])
    if samples != values["samples_per_step"]:
        log.warning(
            "a step has %d %s from here on instead of %d: the data order changes, and so does the learning rate",
            samples, task.samples.unit, values["samples_per_step"],
        )  # fmt: skip
    return ResumeState(manifest.step, samples, values["device_seconds"], resumed=True)


def checkpoint_values(config: EngineConfig, task: Task, samples_per_step: int, device_seconds: float) -> dict[str, Any]:
    """Contents of a checkpoint's manifest."""
    return {
        "task": config.run.task, "model_config": task.manifest(), "samples_per_step": samples_per_step,
        "device_seconds": device_seconds, "world_size": task.world.size, "strategy": config.parallel.strategy,
        "precision": config.train.precision, "torch": str(torch.__version__),
    }  # fmt: skip


def _samples_per_step(samples: Samples, world: DistContext, before: int | None) -> int:
    """As configured, as the resumed run had them, or one micro-batch per process."""
    total = samples.step or before or samples.micro_batch * world.size
    origin = "" if samples.step else " (as in the resumed run)"
    if total % (samples.micro_batch * world.size):
        parts = total // samples.micro_batch
        fits = [n for n in range(1, parts + 1) if parts % n == 0]
        raise ConfigError(
            f"{samples.keys[1]} is {total}{origin}, which {world.size} processes cannot split into micro-batches of "
            f"{samples.micro_batch} ({samples.keys[0]}): start {', '.join(map(str, fits))} processes, or change one of "
            "the two"
        )
    return total

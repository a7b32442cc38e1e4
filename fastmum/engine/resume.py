"""Start of a run: from scratch, or from a checkpoint of any number of processes and strategy."""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fastmum.config.load import settings
from fastmum.config.schema import ConfigError, EngineConfig
from fastmum.engine.checkpoint import CheckpointError, find_checkpoints, load_checkpoint, load_newest
from fastmum.engine.distributed import DistContext
from fastmum.engine.rundir import RunDir
from fastmum.engine.task import Samples, Task
from fastmum.files import expand_user, write_atomic

log = logging.getLogger(__name__)

# Values of a checkpoint that a run continues with.
NEEDED = {"strategy": str, "world_size": int, "samples_per_step": int, "device_seconds": int | float}
MOST_PROCESSES = 4096  # that are suggested
START = "start.json"  # in the run's folder: the job that started it
# Above 0 in the processes of a job that SLURM has queued again, and of those that torchrun has started again.
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
NO_SETTINGS = ("run.dir", "train.resume")  # say where, not what is trained


class ResumeState(NamedTuple):
    """Where a run starts: steps done, samples per step and seconds of all devices, whether the state was loaded.

    `data` are the digests of the data until then; checkpoints of older versions have none.
    """

    step: int
    samples_per_step: int
    device_seconds: float
    resumed: bool
    data: Any = None


def resume(config: EngineConfig, run: RunDir, task: Task, state: Mapping[str, Any]) -> ResumeState:
    """Do what `train.resume` says; `state` is then that of the checkpoint. A job goes on from what it saved before.

    CheckpointError: no checkpoint fits. ConfigError: the number of processes does not divide the samples of a step.
    """
    world, manifest, sizes = task.world, None, task.manifest()
    saved = any(world.gather(world.is_main and _has_saved(run, config.train.resume)))
    match "auto" if saved else config.train.resume:
        case "never":
            if world.is_main:
                run.set_aside()
            world.wait()
        case "auto":
            manifest = load_newest(run.checkpoints, state, sizes, world.control)
        case "latest":
            manifest = load_checkpoint(run.checkpoints, state, sizes, world.control)
        case path:
            manifest = load_checkpoint(expand_user(path), state, sizes, world.control)
    if manifest is None:
        return ResumeState(0, _samples_per_step(task.samples, world, None), 0.0, resumed=False)
    values = manifest.values
    if not all(isinstance(values.get(name), kind) for name, kind in NEEDED.items()) or values["samples_per_step"] < 1:
        raise CheckpointError(f"'{manifest.path}' is not a checkpoint of a run: it lacks one of {', '.join(NEEDED)}")
    before = values["strategy"], values["world_size"]
    log.info("resumed from %s at step %d (%s, %d processes)", manifest.path, manifest.step, *before)
    if world.is_main:
        warn_of_changes(values.get("config"), settings(config))
    samples = _samples_per_step(task.samples, world, values["samples_per_step"])
    if samples != values["samples_per_step"]:
        log.warning(
            "a step has %d %s from here on instead of %d: the data order changes, and so does the learning rate",
            samples, task.samples.unit, values["samples_per_step"],
        )  # fmt: skip
    return ResumeState(manifest.step, samples, values["device_seconds"], resumed=True, data=values.get("data"))


def note_start(run: RunDir, how: str, step: int) -> None:
    """Note in the run's folder that this job did what `train.resume` says and starts at `step`; for one process."""
    if not _has_saved(run, how):
        write_atomic(run.root / START, json.dumps({"job": _job(), "resume": how, "step": step}))


def _has_saved(run: RunDir, how: str) -> bool:
    """Whether this job, which SLURM has queued again or torchrun has started again, has saved since its first start."""
    if all(os.environ.get(name, "0") in ("", "0") for name in RESTARTS):
        return False
    try:
        start = json.loads((run.root / START).read_bytes())
        newest = max((found.manifest.step for found in find_checkpoints(run.checkpoints) if found.manifest), default=0)
        return (start["job"], start["resume"]) == (_job(), how) and newest > start["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _job() -> str | None:
    return next((os.environ[name] for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID") if os.environ.get(name)), None)


def checkpoint_values(config: EngineConfig, task: Task, samples_per_step: int, device_seconds: float) -> dict[str, Any]:
    """Contents of a checkpoint's manifest."""
    return {
        "task": config.run.task, "model_config": task.manifest(), "samples_per_step": samples_per_step,
        "device_seconds": device_seconds, "world_size": task.world.size, "strategy": config.parallel.strategy,
        "data": task.data_digests(),
        "precision": config.train.precision, "torch": str(torch.__version__), "config": settings(config),
    }  # fmt: skip


def warn_of_changes(before: Any, now: Mapping[str, Any]) -> None:
    """Log what a checkpoint has with another value; checkpoints of older versions have none."""
    saved = before if isinstance(before, dict) else {}
    differing = [name for name in now if name in saved and saved[name] != now[name] and name not in NO_SETTINGS]
    if changes := [f"{name} {_shown(saved[name])} -> {_shown(now[name])}" for name in differing]:
        log.warning("differs from the run so far: %s", ", ".join(changes))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _samples_per_step(samples: Samples, world: DistContext, before: int | None) -> int:
    """As configured, as the resumed run had them, or one micro-batch per process."""
    total = samples.step or before or samples.micro_batch * world.size
    origin = "" if samples.step else " (as in the resumed run)"
    if total % (samples.micro_batch * world.size):
        parts = total // samples.micro_batch
        fits = [n for n in range(1, min(parts, MOST_PROCESSES) + 1) if parts % n == 0]
        raise ConfigError(
            f"{samples.keys[1]} is {total}{origin}, which {world.size} processes cannot split into micro-batches of "
            f"{samples.micro_batch} ({samples.keys[0]}): start {', '.join(map(str, fits))} processes, or change one of "
            "the two"
        )
    return total

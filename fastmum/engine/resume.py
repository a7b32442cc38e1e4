"""Where a run begins: anew, or from a checkpoint, of whatever number of processes and strategy."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmum.config import Config, ConfigError
from fastmum.engine.checkpoint import load_checkpoint, load_newest
from fastmum.engine.distributed import DistContext
from fastmum.engine.guard import NonFiniteGuard
from fastmum.engine.meter import no_losses
from fastmum.engine.optimizer import Optimizer
from fastmum.engine.rundir import RunDir

log = logging.getLogger(__name__)


class ResumeState(NamedTuple):
    """Where a run begins.

    Args:
        step: steps done.
        frames_per_step: of all processes together.
        device_seconds: that devices have spent on it, added up.
        state: of `Meter` and `NonFiniteGuard`; empty where it begins anew.
    """

    step: int
    frames_per_step: int
    device_seconds: float
    state: dict[str, Tensor]


def resume(config: Config, run: RunDir, world: DistContext, optimizer: Optimizer) -> ResumeState:
    """Do what `train.resume` says; weights and optimiser are then those of the checkpoint.

    Raises:
        CheckpointError: there is none where there must be one, it cannot be read, or holds another model.
        ConfigError: `data.frames_per_step` does not fit the number of processes.
    """
    about, state = None, optimizer.state() | _empty_state()
    sizes = dataclasses.asdict(config.model_config)
    match config.train.resume:
        case "never":
            if world.is_main:
                run.set_aside()
            world.wait()
        case "auto":
            about = load_newest(run.checkpoints, state, sizes, world.control)
        case "latest":
            about = load_checkpoint(run.checkpoints, state, sizes, world.control)
        case path:
            about = load_checkpoint(Path(path).expanduser(), state, sizes, world.control)
    if about is None:
        return ResumeState(0, _frames_per_step(config, world, None), 0.0, {})
    values = about.values
    log.info(
        "resumed from %s at step %d (%s, %d processes)",
        about.path,
        about.step,
        values["strategy"],
        values["world_size"],
    )
    frames = _frames_per_step(config, world, values["frames_per_step"])
    if frames != values["frames_per_step"]:
        log.warning(
            "a step has %d frames from here on, where the run had %d: the data order is another, and the learning rate "
            "is scaled anew", frames, values["frames_per_step"],
        )  # fmt: skip
    own = {name: state[name] for name in _empty_state()}
    return ResumeState(about.step, frames, values["device_seconds"], own)


def about_checkpoint(
    config: Config, world: DistContext, frames_per_step: int, cost: Mapping[str, float]
) -> dict[str, Any]:
    """What a checkpoint says of its run; `cost` is the state of `Cost`."""
    return {
        "model_config": dataclasses.asdict(config.model_config),
        "frames_per_step": frames_per_step,
        **cost,
        "world_size": world.size,
        "strategy": config.parallel.strategy,
        "precision": config.train.precision,
        "torch": str(torch.__version__),
    }


def _empty_state() -> dict[str, Tensor]:
    cpu = torch.device("cpu")
    return {"meter.totals": no_losses(cpu)} | NonFiniteGuard(cpu).state()


def _frames_per_step(config: Config, world: DistContext, before: int | None) -> int:
    """Frames of a step: as configured, as the run had them, or a batch for each process."""
    batch = config.data.frames_per_batch
    frames = config.data.frames_per_step or before or batch * world.size
    origin = "" if config.data.frames_per_step else " (as the run that is resumed had it)"
    if frames % (batch * world.size):
        parts = frames // batch
        fits = [n for n in range(1, parts + 1) if parts % n == 0]
        raise ConfigError(
            f"data.frames_per_step is {frames}{origin}, which {world.size} processes cannot take in batches of {batch} "
            f"(data.frames_per_batch): start {', '.join(map(str, fits))} processes, or change one of the two"
        )
    return frames

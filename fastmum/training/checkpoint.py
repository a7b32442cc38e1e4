"""Checkpoints: written atomically, the newest few kept, read with a clear word where they do not fit."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from fastmum.model.mum import MuM
from fastmum.training.optim import AdamW

log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d+)\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message is one line for the user."""


def save_checkpoint(
    folder: Path,
    step: int,
    model: MuM,
    optimizer: AdamW,
    meter: dict[str, float],
    keep: int,
) -> Path:
    """Write `step_<step>.pt` and remove all but the newest `keep`.

    The file appears under its name only when all of it is on disk: a crash at any moment leaves the ones before.

    Args:
        step: optimiser steps done.
        meter: state of the run's `Meter`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:07d}.pt"
    partial = path.with_suffix(".partial")
    content = {
        "step": step,
        "model": optimizer.weights.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_config": dataclasses.asdict(model.config),
        "meter": meter,
    }
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    for old in list_checkpoints(folder)[keep:]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, newest first."""
    return sorted((p for p in folder.glob("step_*.pt") if _NAME.fullmatch(p.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name).group(1))


def set_aside_after(folder: Path, step: int) -> None:
    """Rename checkpoints of more steps than a run resumes from: they belong to another branch of it."""
    for path in list_checkpoints(folder):
        if _step(path) > step:
            path.rename(path.with_suffix(".pt.abandoned"))
            log.info("'%s' lies after the step that the run goes on from and was renamed", path)


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, None where there is none.

    Raises:
        CheckpointError: there are checkpoints, but none of them can be read.
    """
    candidates = list_checkpoints(folder)
    for path in candidates:
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            log.warning("%s; the one before is tried", error)
    if candidates:
        raise CheckpointError(f"no checkpoint in '{folder}' can be read; train.resume=never sets the run aside")
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU.

    Raises:
        CheckpointError: no such file, or not a whole checkpoint of fastmum.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint '{path}' does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"checkpoint '{path}' cannot be read ({type(error).__name__}: {reason})") from None
    if not isinstance(content, dict) or not {"step", "model", "optimizer", "model_config", "meter"} <= content.keys():
        raise CheckpointError(f"'{path}' is not a training checkpoint of fastmum")
    content["path"] = path
    return content


def restore(content: dict[str, Any], model: MuM, optimizer: AdamW) -> None:
    """Put a checkpoint's weights and optimiser state into place.

    Raises:
        CheckpointError: it holds a model of other sizes; the message says which.
    """
    ours, theirs = dataclasses.asdict(model.config), content["model_config"]
    other = [f"{key} {theirs.get(key)} (configured: {ours[key]})" for key in ours if theirs.get(key) != ours[key]]
    if other:
        raise CheckpointError(
            f"checkpoint '{content['path']}' holds another model: {', '.join(other)}; "
            "choose another run.dir, or train.resume=never to set the old run aside"
        )
    optimizer.weights.load_state_dict(content["model"])
    # The configuration decides these, not the checkpoint: a resumed run may change them.
    configured = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(content["optimizer"])
    for weight, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):  # in the layout of their weight, whoever wrote them
            state[name] = torch.empty_like(weight).copy_(state[name])
    for group, values in zip(optimizer.param_groups, configured, strict=True):
        group.update(values)

"""The model that `--weights` names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastmum
from fastmum.model.config import PRESETS, ModelConfig
from fastmum.model.encoder import Encoder
from fastmum.model.mum import MuM
from fastmum.pretrained.errors import WeightsError

RANDOM = "random:"


class Weights(NamedTuple):
    """A model to evaluate.

    Args:
        name: short, for tables and files.
        model: in eval mode.
    """

    name: str
    model: Encoder


def load_weights(
    source: str, name: str | None, device: torch.device, overrides: Mapping[str, Any], seed: int = 0
) -> Weights:
    """Load weights, or make up some.

    Args:
        source: what `fastmum.load_pretrained` takes, or random:PRESET, an untrained model to compare with.
        name: for tables; None: after the source.
        device: to put it on.
        overrides: for `fastmum.load_pretrained`; of an untrained model, sizes that differ from the preset's.
        seed: of an untrained model.

    Raises:
        WeightsError: they cannot be loaded, no such preset, or a size that cannot be.
    """
    if not source.startswith(RANDOM):
        model = fastmum.load_pretrained(source, device=device, **overrides)
        return Weights(name or _name(Path(source)), model)
    preset = source.removeprefix(RANDOM)
    if preset not in PRESETS:
        raise WeightsError(f"there is no preset '{preset}' for --weights {RANDOM}PRESET: one of {', '.join(PRESETS)}")
    sizes = [field.name for field in fields(ModelConfig)]
    for key in overrides:
        if key not in sizes:
            raise WeightsError(f"--set {key} is no size of a model that is made up: one of {', '.join(sizes)}")
    try:
        config = replace(PRESETS[preset], **overrides)
    except ValueError as error:
        raise WeightsError(f"--set: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MuM(config)
    return Weights(name or f"untrained {preset}", model.to(device).eval())


def _name(source: Path) -> str:
    """After the run and the checkpoint, or after the file."""
    path = source.expanduser().absolute()
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name} {path.name}"
    if path.name == "checkpoints":
        return path.parent.name
    return path.stem if path.is_file() else path.name

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
from fastmum.pretrained import WeightsError

RANDOM = "random:"


class Weights(NamedTuple):
    """A model in eval mode, and its name in tables and files."""

    name: str
    model: Encoder


def load_weights(
    source: str, name: str | None, device: torch.device, overrides: Mapping[str, Any], seed: int = 0
) -> Weights:
    """Load weights, or create an untrained model.

    Args:
        source: an argument of `fastmum.load_pretrained`, or random:PRESET for an untrained model.
        name: in tables; None: derived from the source.
        overrides: of `fastmum.load_pretrained`; for an untrained model, sizes that differ from the preset.
        seed: of an untrained model.

    Raises:
        WeightsError: weights that cannot be loaded, an unknown preset or an invalid size.
    """
    if not source.startswith(RANDOM):
        path = Path(source).expanduser().absolute()
        if path.parent.name == "checkpoints":
            derived = f"{path.parent.parent.name} {path.name}"
        else:
            derived = path.parent.name if path.name == "checkpoints" else path.stem if path.is_file() else path.name
        return Weights(name or derived, fastmum.load_pretrained(source, device=device, **overrides))
    preset = source.removeprefix(RANDOM)
    if preset not in PRESETS:
        raise WeightsError(f"there is no preset '{preset}' for --weights {RANDOM}PRESET: one of {', '.join(PRESETS)}")
    sizes = [field.name for field in fields(ModelConfig)]
    if unknown := [key for key in overrides if key not in sizes]:
        raise WeightsError(f"--set {unknown[0]} is no size of an untrained model: one of {', '.join(sizes)}")
    try:
        config = replace(PRESETS[preset], **overrides)
    except ValueError as error:
        raise WeightsError(f"--set: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MuM(config)
    return Weights(name or f"untrained {preset}", model.to(device).eval())

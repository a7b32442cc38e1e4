"""From a path to tensors: checkpoints of runs, safetensors, files of torch.save. Names of files mean nothing."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from fastmum.engine.checkpoint import CheckpointError, read_weights
from fastmum.pretrained.dinov3 import from_dinov3, is_dinov3
from fastmum.pretrained.errors import WeightsError, some

KINDS = "a run, a folder of checkpoints, a checkpoint, a file of torch.save or of safetensors, a folder of transformers"


class Saved(NamedTuple):
    """What lies at a path.

    Args:
        path: the file, or the checkpoint that was chosen.
        tree: names -> tensors, or further such mappings; other things may lie among them.
        sizes: fields of `ModelConfig` that it states itself.
        step: of the run that wrote it, where it says so.
        learnt_only: it holds what is learnt, without the buffers of a state dict.
    """

    path: Path
    tree: Mapping[str, Any]
    sizes: Mapping[str, Any] = MappingProxyType({})
    step: int | None = None
    learnt_only: bool = False


def read_saved(path: Path) -> Saved:
    """Read whatever weights lie at a path.

    Raises:
        WeightsError: nothing is there, or nothing of the kinds that can be read.
    """
    if path.is_dir():
        return _read_dinov3(path) if is_dinov3(path) else _read_run(path)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise WeightsError(f"'{path}' does not exist") from None
    except OSError as error:
        raise WeightsError(f"'{path}' cannot be read ({error.strerror})") from None
    if head[8:] == b"{":  # behind the length of its header, 8 bytes
        return _read_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_torch(path)
    raise WeightsError(f"'{path}' holds no weights: {KINDS} is expected")


def _read_run(path: Path) -> Saved:
    try:
        about, tensors = read_weights(path)
    except CheckpointError as error:
        raise WeightsError(str(error)) from None
    return Saved(about.path, tensors, about.values.get("model_config", {}), about.step, learnt_only=True)


def _read_dinov3(path: Path) -> Saved:
    weights = path / "model.safetensors"
    if not weights.exists():
        raise WeightsError(f"'{path}' has a config.json, but no model.safetensors")
    try:
        config = json.loads((path / "config.json").read_bytes())
        state, sizes = from_dinov3(_read_safetensors(weights).tree, config)
    except (KeyError, RuntimeError, TypeError) as error:
        what = error if isinstance(error, WeightsError) else f"{type(error).__name__}: {error}"
        raise WeightsError(f"'{path}' does not hold an encoder of fastmum ({what})") from None
    return Saved(path, state, sizes)


def _read_safetensors(path: Path) -> Saved:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"'{path}' cannot be read ({error})") from None
    try:
        sizes = json.loads(metadata["model_config"]) if "model_config" in metadata else {}
        step = int(metadata["step"]) if "step" in metadata else None
    except ValueError as error:
        raise WeightsError(f"the metadata of '{path}' cannot be read ({error})") from None
    return Saved(path, tensors, sizes, step)


def _read_torch(path: Path) -> Saved:
    try:
        # Training scripts put their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"'{path}' holds {_objects(path)} beside tensors, and such are not loaded from files: they can run code; "
            "save its state dict alone"
        ) from error
    except Exception as error:  # a damaged file leads torch to any of them
        raise WeightsError(f"'{path}' cannot be read ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"'{path}' holds a {type(content).__name__}, but a state dict is expected")
    return Saved(path, content)


def _objects(path: Path) -> str:
    try:
        return some(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or "Python objects"
    except Exception:  # torch looks into its present format only
        return "Python objects"

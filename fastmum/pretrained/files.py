"""From a path to tensors: checkpoints of runs, safetensors, torch.save files. File names have no meaning."""

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError, safe_open

from fastmum.engine.checkpoint import CheckpointError, read_weights
from fastmum.engine.rundir import RunDir
from fastmum.errors import first_line, some_names
from fastmum.files import read_json, regular
from fastmum.pretrained.layout import SIZES, WeightsError

KINDS = "a run, a folder of checkpoints, a checkpoint, a torch.save or safetensors file, a folder of transformers"


CONFIG, IMAGES = "config.json", "preprocessor_config.json"
MODEL_TYPES = {"dinov3_vit": "dinov3", "vit_mae": "mae"}  # of transformers


class Saved(NamedTuple):
    """What a file of weights holds."""

    path: Path  # the file, or the chosen checkpoint
    tree: Mapping[str, Any]  # names -> tensors, further mappings or other values
    sizes: Mapping[str, Any] = MappingProxyType({})  # fields of `ModelConfig` that are stated
    step: int | None = None  # of the run, if stated
    parameters_only: bool = False  # buffers are missing
    ema: bool = False  # the weights are an exponential moving average
    frames: int | None = None  # seen in training, if stated
    image_size: int | None = None  # side of the training images in pixels, if stated
    config: Mapping[str, Any] = MappingProxyType({})  # content of a folder's config.json
    images: Mapping[str, Any] = MappingProxyType({})  # content of a folder's preprocessor_config.json


def run_folder(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint is in, None if there is none around it."""
    folder = checkpoint.absolute().parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    return folder if RunDir(folder).config.is_file() else None


def run_settings(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Sections of the configuration of the run that a checkpoint is in, as plain YAML; empty if it cannot be read."""
    try:
        content = yaml.safe_load(RunDir(folder).config.read_bytes()) if (folder := run_folder(checkpoint)) else None
    except (OSError, yaml.YAMLError):
        content = None
    sections = content if isinstance(content, dict) else {}
    return {name: section for name, section in sections.items() if isinstance(section, dict)}


def read_saved(path: Path, ema: bool | None = None) -> Saved:
    """Read the weights of a MuM at a path, the EMA weights of a checkpoint if `ema` is True, or None and it has them.

    WeightsError if there are none, they cannot be read, or `ema` is True and the path is no checkpoint with them.
    """
    if path.is_dir():
        return _read_run(path, ema)
    if ema:
        raise WeightsError(f"'{path}' is no checkpoint of a run, so it has no EMA weights: set ema to auto or off")
    return read_file(path)


def read_file(path: Path) -> Saved:
    """Read a torch.save or safetensors file, or such a folder with a config.json; WeightsError if it cannot be read."""
    if path.is_dir():
        return _read_folder(path)
    try:
        with open(regular(path), "rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise WeightsError(f"'{path}' does not exist") from None
    except OSError as error:
        raise WeightsError(f"'{path}' cannot be read ({error.strerror})") from None
    if head[8:] == b"{":  # after 8 bytes with the length of the header
        return _read_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_torch(path)
    raise WeightsError(f"'{path}' holds no weights: {KINDS} is expected")


def _read_run(path: Path, ema: bool | None) -> Saved:
    try:
        manifest, tensors = read_weights(path)
        task, sizes = manifest.values.get("task", "mum"), manifest.values.get("model_config", {})
        if task != "mum" or not sizes.keys() <= set(SIZES):
            raise WeightsError(f"'{manifest.path}' is a checkpoint of the task '{task}', but one of a MuM is expected")
        has_ema = any(name.startswith("ema.") for name in manifest.tensors)
        if ema and not has_ema:
            raise WeightsError(f"'{manifest.path}' has no EMA weights: it was trained without train.ema")
        if use_ema := has_ema and ema is not False:  # frozen parameters have no average
            tensors |= read_weights(manifest.path, prefix="ema.").tensors
    except CheckpointError as error:
        raise WeightsError(str(error)) from None
    samples = manifest.values.get("samples_per_step")
    frames = None if samples is None else manifest.step * samples
    image_size = _whole(run_settings(manifest.path).get("data", {}).get("image_size"))
    return Saved(manifest.path, tensors, sizes, manifest.step, True, use_ema, frames, image_size)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def is_transformers(path: Path) -> str:
    """The kind of public encoder that a folder of transformers holds, "" if it is no such folder."""
    if not path.is_dir():
        return ""
    try:
        return MODEL_TYPES.get(str(read_json(path / CONFIG).get("model_type")), "")
    except (OSError, ValueError, AttributeError):
        return ""


def _read_folder(path: Path) -> Saved:
    try:
        config = read_json(path / CONFIG)
        images = read_json(path / IMAGES) if (path / IMAGES).exists() else {}
        if not isinstance(config, dict) or not isinstance(images, dict):
            raise ValueError(f"{CONFIG} or {IMAGES} is no table")
        tensors = {name: tensor for file in _shards(path) for name, tensor in read_file(file).tree.items()}
    except (OSError, ValueError) as error:
        what = f"{first_line(error)}"
        raise WeightsError(f"'{path}' cannot be read as a folder with {CONFIG} and weights ({what})") from None
    return Saved(path, tensors, parameters_only=True, image_size=_whole(config.get("image_size")), config=config,
                 images=images)  # fmt: skip


def _shards(folder: Path) -> list[Path]:
    """The files of weights in a folder of transformers: one, or those that its index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        if not whole.exists():
            raise WeightsError(f"'{folder}' has a config.json, but no {whole.name} and no {index.name}")
        return [whole]
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        shards = [folder / name for name in names if Path(name).name == name]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise WeightsError(f"'{index}' is no index of weights: it must be JSON with a weight_map") from None
    if len(shards) < len(names):
        raise WeightsError(f"'{index}' names files outside of its folder")
    return shards


def _read_safetensors(path: Path) -> Saved:
    try:
        with safe_open(regular(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"'{path}' cannot be read ({error})") from None
    try:
        sizes = json.loads(metadata["model_config"]) if "model_config" in metadata else {}
        if not isinstance(sizes, dict):
            raise ValueError("model_config is no table")
        step, size = (int(metadata[name]) if name in metadata else None for name in ("step", "image_size"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the metadata of '{path}' cannot be read ({error})") from None
    return Saved(path, tensors, sizes, step, image_size=size)


def _read_torch(path: Path) -> Saved:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type for member in archive.infolist()):  # torch.save does not compress
                    raise WeightsError("it is compressed, so its size is unknown")
        # Training scripts save their arguments next to the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        why = "which are not loaded, because they can run code; save only its state dict"
        raise WeightsError(f"'{path}' holds {_objects(path)} next to tensors, {why}") from error
    except Exception as error:  # a damaged file raises any type
        raise WeightsError(f"'{path}' cannot be read ({first_line(error)})") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"'{path}' holds a {type(content).__name__}, but a state dict is expected")
    return Saved(path, content)


def _objects(path: Path) -> str:
    try:
        return some_names(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or "Python objects"
    except Exception:  # an older format
        return "Python objects"

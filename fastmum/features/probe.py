"""Trained probes in a file, with what is needed to use them again: `fastmum predict`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmum.errors import writing
from fastmum.features.cache import weights_digest
from fastmum.features.images import FeaturesError
from fastmum.files import atomic_path, regular
from fastmum.model.encoder import Encoder
from fastmum.pretrained.load import load_encoder

KEY = "fastmum_probe"  # of the metadata


class Probe(NamedTuple):
    """A probe on a frozen encoder."""

    tensors: Mapping[str, Tensor]  # its state dict
    about: Mapping[str, Any]  # for JSON: "task", the encoder as `of_encoder` describes it, and the task's settings


def of_encoder(encoder: Encoder, spec: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What `probe_encoder` needs to load the same encoder, which was loaded without a decoder."""
    named = {name: str(x) if isinstance(x, torch.dtype) else x for name, x in overrides.items()}
    named.pop("encoder_only", None)
    return {"encoder": spec, "overrides": named, "digest": weights_digest(encoder)}


def write_probe(file: Path, probe: Probe) -> None:
    """Write a .safetensors file; FeaturesError if it cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in probe.tensors.items()}
    with writing(file, FeaturesError, SafetensorError), atomic_path(file) as partial:
        save_file(tensors, partial, {"format": "pt", KEY: json.dumps(probe.about)})


def find_probe(path: Path) -> Path | None:
    """The file of a probe, `path` or the only one in that folder; None if there is none. FeaturesError: several."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.suffix == ".safetensors" else []
    found = [file for file in files if file.name[0] != "." and _about(file) is not None]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise FeaturesError(f"'{path}' holds {len(found)} probes: name one of its files ({names})")
    return found[0] if found else None


def read_probe(path: Path) -> Probe:
    """The probe of a file, or the only one in a folder; FeaturesError if there is none."""
    file = find_probe(path)
    if file is None:
        raise FeaturesError(f"'{path}' holds no probe of fastmum.evaluate")
    with safe_open(file, "pt") as opened:
        return Probe({name: opened.get_tensor(name) for name in opened.keys()}, _about(file) or {})  # noqa: SIM118


def _about(file: Path) -> dict[str, Any] | None:
    try:
        with safe_open(regular(file), "pt") as opened:
            return json.loads((opened.metadata() or {})[KEY])
    except (OSError, KeyError, ValueError, SafetensorError):
        return None


def probe_encoder(probe: Probe, spec: str | None = None) -> Encoder:
    """The frozen encoder of a probe, on the CPU; `spec`: if its files were moved.

    WeightsError: it cannot be loaded. FeaturesError: it has other weights than the one that the probe was trained on.
    """
    about = probe.about
    encoder = load_encoder(spec or about["encoder"], **about["overrides"])
    if weights_digest(encoder) != about["digest"]:
        raise FeaturesError(f"the encoder '{spec or about['encoder']}' has other weights than the probe was trained on")
    return encoder

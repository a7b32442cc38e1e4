"""Features on disk: safetensors, or NumPy's npz, with the same names.

`NAME/cls` (D,), `NAME/patch` (P, D) and `NAME/placement` (4,) int64 (see `Placement`) for each image; with several
layers (n, D) and (n, P, D). Encoders without CLS have no `NAME/cls`. Their description is JSON: the metadata key
`about`, in an npz an array of that name.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmum.errors import writing
from fastmum.features.images import FeaturesError, Placement
from fastmum.files import atomic_path, regular

SUFFIXES = (".safetensors", ".npz")
ABOUT = "about"


class Tokens(NamedTuple):
    """Features of an image."""

    cls: Tensor | None  # (D,), or (n, D) for several layers
    patch: Tensor  # (P, D) or (n, P, D), patches row by row
    placement: Placement  # of the image in the encoder's input


def check_file(file: Path, force: bool) -> None:
    """Create the folder of a file; FeaturesError if features cannot be written there or the file exists."""
    if file.suffix not in SUFFIXES:
        raise FeaturesError(f"--out is '{file}', but must end in {' or '.join(SUFFIXES)}")
    if file.is_dir() or (file.exists() and not force):
        raise FeaturesError(f"'{file}' is there already; --force replaces it, --out names another file")
    with writing(file, FeaturesError):
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()


def write_features(file: Path, features: Mapping[str, Tokens], about: Mapping[str, Any]) -> None:
    """Write features and their description to a .safetensors file, or .npz, which stores bfloat16 as float32.

    FeaturesError if the file cannot be written; an existing file is kept.
    """
    tensors: dict[str, Tensor] = {}
    for name, (cls, patch, placement) in features.items():
        tensors |= {f"{name}/{part}": x.contiguous() for part, x in (("cls", cls), ("patch", patch)) if x is not None}
        tensors[f"{name}/placement"] = torch.tensor(placement)
    with writing(file, FeaturesError, SafetensorError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as partial:
            if file.suffix == ".npz":
                arrays: Any = {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in tensors.items()}
                np.savez(partial, **arrays | {ABOUT: json.dumps(about)})
            else:
                save_file(tensors, partial, {"format": "pt", ABOUT: json.dumps(about)})


def read_features(file: Path) -> tuple[dict[str, Tokens], dict[str, Any]]:
    """Features by names of images, and their description; FeaturesError if the file has no features."""
    try:
        if file.suffix == ".npz":
            with np.load(regular(file)) as arrays:
                about, tensors = str(arrays[ABOUT]), {n: torch.from_numpy(arrays[n]) for n in arrays if n != ABOUT}
        else:
            with safe_open(regular(file), "pt") as opened:
                about = opened.metadata()[ABOUT]
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        features = {}
        for name in (key.removesuffix("/patch") for key in tensors if key.endswith("/patch")):
            placement = Placement(*tensors[f"{name}/placement"].tolist())
            features[name] = Tokens(tensors.get(f"{name}/cls"), tensors[f"{name}/patch"], placement)
        return features, json.loads(about)
    except FileNotFoundError:
        raise FeaturesError(f"'{file}' does not exist") from None
    except (OSError, MemoryError, EOFError, BadZipFile, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FeaturesError(f"'{file}' holds no features ({error})") from error

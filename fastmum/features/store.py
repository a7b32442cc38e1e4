"""Features on disk: safetensors, or NumPy's npz. Both have the same names.

`NAME/cls` (D,), `NAME/patch` (P, D) and `NAME/placement` (4,) int64, see `Placement`, for every image; with several
layers (n, D) and (n, P, D). What they are of, as JSON, is the metadata key `about`, in an npz an array of that name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmum.features.errors import FeaturesError
from fastmum.features.extract import Tokens
from fastmum.features.images import Placement

SUFFIXES = (".safetensors", ".npz")
ABOUT = "about"


def check_file(file: Path, force: bool) -> None:
    """Make the folder of a file, and look whether features can be written there.

    Raises:
        FeaturesError: another suffix, or it is there and not to be replaced.
    """
    if file.suffix not in SUFFIXES:
        raise FeaturesError(f"--out is '{file}', but must end in {' or '.join(SUFFIXES)}")
    if file.is_dir() or (file.exists() and not force):
        raise FeaturesError(f"'{file}' is there already; --force replaces it, --out names another file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _partial(file).touch()
        _partial(file).unlink()
    except OSError as error:
        raise FeaturesError(f"'{file}' cannot be written ({error.strerror})") from None


def _partial(file: Path) -> Path:
    return file.with_name(f"{file.name}.partial")


def write_features(file: Path, features: Mapping[str, Tokens], about: Mapping[str, Any]) -> None:
    """Write features as the suffix says; a file that is there is replaced when all is written.

    Args:
        file: .safetensors, or .npz, which has no bfloat16 and takes float32 instead.
        features: of `extract`.
        about: what is worth knowing, as JSON has it.

    Raises:
        FeaturesError: it cannot be written.
    """
    tensors = {
        f"{name}/{part}": tensor.contiguous()
        for name, tokens in features.items()
        for part, tensor in (
            ("cls", tokens.cls), ("patch", tokens.patch), ("placement", torch.tensor(tokens.placement)),
        )
    }  # fmt: skip
    partial = _partial(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            if file.suffix == ".npz":
                with open(partial, "wb") as opened:
                    np.savez(opened, **{ABOUT: json.dumps(about)}, **{n: _array(t) for n, t in tensors.items()})
            else:
                save_file(tensors, partial, {"format": "pt", ABOUT: json.dumps(about)})
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FeaturesError(f"'{file}' cannot be written ({reason})") from error


def _array(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def read_features(file: Path) -> tuple[dict[str, Tokens], dict[str, Any]]:
    """What `write_features` wrote: features by names of images, and what it was told about them.

    Raises:
        FeaturesError: no such file, or one of something else.
    """
    try:
        if file.suffix == ".npz":
            with np.load(file) as arrays:
                about, tensors = str(arrays[ABOUT]), {n: torch.from_numpy(arrays[n]) for n in arrays if n != ABOUT}
        else:
            with safe_open(file, "pt") as opened:
                about = opened.metadata()[ABOUT]
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        names = [key.removesuffix("/cls") for key in tensors if key.endswith("/cls")]
        return {
            name: Tokens(
                tensors[f"{name}/cls"], tensors[f"{name}/patch"], Placement(*tensors[f"{name}/placement"].tolist())
            )
            for name in names
        }, json.loads(about)
    except FileNotFoundError:
        raise FeaturesError(f"'{file}' does not exist") from None
    except (OSError, EOFError, BadZipFile, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FeaturesError(f"'{file}' holds no features ({error})") from error

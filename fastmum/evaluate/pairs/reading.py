"""Readers of camera files that raise one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fastmum.data.errors import DataError, reading


def read_table(file: Path, shape: tuple[int, int]) -> np.ndarray:
    """The upper left part (rows, columns) of a matrix in a text file, float64.

    Raises:
        DataError: it cannot be read or is smaller.
    """
    with reading(file, "a table of numbers"):
        table = np.loadtxt(file, dtype=np.float64, ndmin=2)
    if table.shape[0] < shape[0] or table.shape[1] < shape[1]:
        raise DataError(f"'{file}' holds {table.shape} numbers, but at least {shape} are expected")
    return table[: shape[0], : shape[1]]


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it cannot be read.
    """
    with reading(file, "JSON"):
        return json.loads(file.read_text(encoding="utf-8"))


def read_archive(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz, or of the dictionary in an .npy.

    The published files hold pickled objects: read only files that you trust.

    Raises:
        DataError: it cannot be read.
    """
    try:
        loaded = np.load(file, allow_pickle=True)
        return dict(loaded.item()) if file.suffix == ".npy" else dict(loaded)
    except Exception as error:  # unpickling raises any error
        raise DataError(f"archive '{file}' cannot be read ({str(error).partition(chr(10))[0] or error!r})") from None


def matrix(value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Finite numbers of a shape, float64.

    Raises:
        DataError: anything else; the message begins with `what`.
    """
    expected = f"{' x '.join(map(str, shape))} finite numbers" if shape else "a finite number"
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{what} must be {expected}") from None
    if found.shape != shape or not np.isfinite(found).all():
        raise DataError(f"{what} must be {expected}, but is of shape {found.shape}")
    return found


def square(value: Any, side: int, what: str) -> np.ndarray:
    """Intrinsics (3, 3) or a pose (4, 4): a finite invertible matrix, float64.

    Raises:
        DataError: anything else; the message begins with `what`.
    """
    found = matrix(value, (side, side), what)
    if np.linalg.matrix_rank(found) < side:
        raise DataError(f"{what} is a singular matrix, which intrinsics and poses never are")
    return found

"""Reading pictures, depth and cameras from files, with one clear line for a file that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fastmum.data.errors import DataError
from fastmum.evaluate.pairs.pair import Camera, Frame, unit_camera

ORIENTATION = 0x0112  # EXIF tag; from 5 on, width and height are swapped


def frame_of(key: str, image: Path, depth: Path, K: np.ndarray, unit: float = 1.0) -> Frame:
    """A frame whose picture and depth are files of their own.

    Args:
        key: see `Frame`.
        image, depth: the files, as `read_rgb` and `read_depth` take them.
        K: (3, 3) intrinsics in pixels of the picture.
        unit: what one count of depth is worth.
    """
    return Frame(key, partial(read_rgb, image), partial(_read_camera, image, depth, K, unit), image)


def _read_camera(image: Path, depth: Path, K: np.ndarray, unit: float) -> Camera:
    return unit_camera(K, image_size(image), read_depth(depth, unit))


def image_size(file: Path) -> tuple[int, int]:
    """Width and height of a picture that `read_rgb` gives, from its header.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            return image.size[::-1] if turned else image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable("image", file, error) from None


def read_rgb(file: Path) -> Image.Image:
    """A picture, turned as its EXIF tag says.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable("image", file, error) from None


def read_depth(file: Path, unit: float = 1.0) -> np.ndarray:
    """A depth map, (h, w) float32, 0 where it is unknown.

    Args:
        file: a 16-bit .png, an .npy, or an .h5 with the data set "depth", as MegaDepth has them.
        unit: what one count is worth.

    Raises:
        DataError: it cannot be read, or is no map.
    """
    readers: dict[str, Callable[[Path], np.ndarray]] = {".png": _png, ".npy": _npy, ".h5": _h5}
    if file.suffix not in readers:
        raise DataError(f"depth '{file}' ends in '{file.suffix}', but one of {', '.join(readers)} is expected")
    try:
        stored = readers[file.suffix](file)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, SyntaxError) as error:
        raise _unreadable("depth", file, error) from None
    if stored.ndim != 2:
        raise DataError(f"depth '{file}' has shape {stored.shape}, but (height, width) is expected")
    return clean_depth(stored.astype(np.float32) * np.float32(unit))


def clean_depth(depth: np.ndarray) -> np.ndarray:
    """Depth with 0 for what is not finite or not in front of the camera."""
    return np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)


def read_table(file: Path, shape: tuple[int, int]) -> np.ndarray:
    """A matrix of numbers in a text file, at least of a shape, (rows, columns) float64 cut to it.

    Raises:
        DataError: it cannot be read or is smaller.
    """
    try:
        table = np.loadtxt(file, dtype=np.float64, ndmin=2)
    except (OSError, ValueError) as error:
        raise _unreadable("file", file, error) from None
    if table.shape[0] < shape[0] or table.shape[1] < shape[1]:
        raise DataError(f"'{file}' holds {table.shape} numbers, but at least {shape} are expected")
    return table[: shape[0], : shape[1]]


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable("file", file, error) from None


def read_archive(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz, or of the dictionary in an .npy.

    Those files hold pickled objects, as their authors publish them: read none that you do not trust.

    Raises:
        DataError: it cannot be read.
    """
    try:
        loaded = np.load(file, allow_pickle=True)
        return dict(loaded.item()) if file.suffix == ".npy" else dict(loaded)
    except Exception as error:  # unpickling raises what it likes
        raise _unreadable("archive", file, error) from None


def matrix(value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Finite numbers of a shape, float64.

    Raises:
        DataError: it is something else; the message begins with `what`.
    """
    expected = f"{' x '.join(map(str, shape))} finite numbers" if shape else "a finite number"
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{what} must be {expected}") from None
    if found.shape != shape or not np.isfinite(found).all():
        raise DataError(f"{what} must be {expected}, but is of shape {found.shape}")
    return found


def invertible(found: np.ndarray, what: str) -> np.ndarray:
    """The same matrix (n, n), if it has an inverse.

    Raises:
        DataError: it has none; the message begins with `what`.
    """
    if np.linalg.matrix_rank(found) < len(found):
        raise DataError(f"{what} is a singular matrix, which intrinsics and poses never are")
    return found


def square(value: Any, side: int, what: str) -> np.ndarray:
    """Intrinsics (3, 3) or a pose (4, 4): finite numbers, float64, that have an inverse.

    Raises:
        DataError: it is something else; the message begins with `what`.
    """
    return invertible(matrix(value, (side, side), what), what)


def _png(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def _npy(file: Path) -> np.ndarray:
    return np.load(file, allow_pickle=False)


def _h5(file: Path) -> np.ndarray:
    try:
        import h5py
    except ImportError:
        raise DataError(f"depth '{file}' needs h5py: pip install 'fastmum[evaluate]'") from None
    with h5py.File(file, "r") as archive:
        return np.asarray(archive["depth"])


def _unreadable(what: str, file: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
    return DataError(f"{what} '{file}' cannot be read ({reason})")

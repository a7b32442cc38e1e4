"""Listing folders: images and sub-folders in natural order (2 before 10)."""

from __future__ import annotations

import os
from pathlib import Path

import natsort

from fastmum.data.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image; hidden ones (macOS leaves them) are not."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def images_in(folder: Path) -> list[str]:
    """Names of the images in a folder in natural order; none where there is no such folder."""
    return natsort.natsorted(name for name in _names(folder) if is_image(name))


def folders_in(folder: Path) -> list[str]:
    """Names of the sub-folders that are not hidden, in natural order; none where there is no such folder."""
    return natsort.natsorted(
        name for name in _names(folder) if not name.startswith(".") and os.path.isdir(os.path.join(folder, name))
    )


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"the folder '{folder}' cannot be read ({error.strerror})") from None

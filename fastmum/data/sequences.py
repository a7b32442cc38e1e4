"""Finding sequences: folders of images on disk, in natural order, and which of them are held out."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import natsort

from fastmum.data.errors import DataError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
# Folders that lie beside a scene's photographs and hold something else than photographs.
OTHER_FOLDERS = frozenset({"depth", "depths", "mask", "masks", "normal", "normals"})


@dataclass(frozen=True)
class Sequences:
    """Sequences of frames of one scene each.

    Args:
        names: of the sequences, for logs and pictures.
        frames: the image files of each, in order.
    """

    names: tuple[str, ...]
    frames: tuple[tuple[Path, ...], ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_frames(self) -> int:
        """Frames of all sequences together."""
        return sum(map(len, self.frames))

    def select(self, keep: list[int]) -> Sequences:
        """The sequences with the given numbers."""
        return Sequences(tuple(self.names[i] for i in keep), tuple(self.frames[i] for i in keep))


def find_sequences(root: str | Path, min_views: int = 1) -> Sequences:
    """Every folder at or below `root` that holds images, as a sequence of them in natural order.

    Hidden folders and those named after depth, masks or normals are passed over, shorter sequences are left out;
    both are logged.

    Raises:
        DataError: no such folder, or no sequence of at least `min_views` images in it.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"data.root is '{root}', but there is no such folder")
    names, frames, short, passed = [], [], [], []
    for folder, files in _image_folders(root, passed):
        name = folder.relative_to(root).as_posix()
        if len(files) < min_views:
            short.append(name)
            continue
        names.append(root.name if name == "." else name)
        frames.append(tuple(folder / file for file in files))
    if passed:
        log.info("%d folders of depth, masks or normals under %s are not read", len(passed), root)
    if short:
        log.warning("%d folders under %s hold fewer than %d images and are left out: %s",
                    len(short), root, min_views, _few(short))  # fmt: skip
    if not names:
        raise DataError(
            f"data.root is '{root}', but no folder in it holds at least {min_views} images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}); each sub-folder with images is one sequence"
        )
    return Sequences(tuple(names), tuple(frames))


def find_single_images(root: str | Path) -> Sequences:
    """Every image at or below `root` as a sequence of its own.

    Raises:
        DataError: no such folder, or no image in it.
    """
    root = Path(root).expanduser()
    files = [folder / file for folder, files in _image_folders(root, []) for file in files]
    if not files:
        raise DataError(f"data.image_root is '{root}', but there is no image in it")
    return Sequences(tuple(file.relative_to(root).as_posix() for file in files), tuple((file,) for file in files))


def split_held_out(sequences: Sequences, share: float) -> tuple[Sequences, Sequences]:
    """Training and held-out sequences; at least one is held out if `share` > 0 and there are two or more.

    The choice depends on each sequence's name alone, so that adding sequences does not reshuffle the others.
    """
    count = len(sequences)
    held = min(count - 1, max(1, round(share * count))) if share > 0 else 0
    by_hash = sorted(range(count), key=lambda i: hashlib.sha256(sequences.names[i].encode()).digest())
    return sequences.select(sorted(by_hash[held:])), sequences.select(sorted(by_hash[:held]))


def _image_folders(root: Path, passed: list[Path]) -> Iterator[tuple[Path, list[str]]]:
    for folder, subfolders, files in os.walk(root, followlinks=True):
        other = [name for name in subfolders if name.lower() in OTHER_FOLDERS]
        passed += [Path(folder, name) for name in other]
        subfolders[:] = natsort.natsorted(n for n in subfolders if n not in other and not n.startswith("."))
        images = [f for f in files if Path(f).suffix.lower() in IMAGE_SUFFIXES and not f.startswith(".")]
        if images:
            yield Path(folder), natsort.natsorted(images)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

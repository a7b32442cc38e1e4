"""3DStreetView and ImageNet-1K: images without cameras or depth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Options
from fastmum.data.manifest import SequenceRecord

STREETVIEW = "dataset_aligned"
RELEASED_CHUNK = 24


def streetview_parts(root: Path, options: Options) -> list[str]:
    """Folders of numbered photographs."""
    return base.folders_in(root / STREETVIEW)


def streetview_sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The folder in chunks."""
    frames = [f"{STREETVIEW}/{part}/{name}" for name in base.images_in(root / STREETVIEW / part)]
    yield from base.chunks(SequenceRecord(part, frames), options, RELEASED_CHUNK)


def imagenet_parts(root: Path, options: Options) -> list[str]:
    """Classes: folders of `train/`, or of the root if there is no such folder."""
    if (root / "train").is_dir():
        return [f"train/{name}" for name in base.folders_in(root / "train")]
    return base.folders_in(root)


def imagenet_sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """Every image is a sequence."""
    for name in base.images_in(root / part):
        yield SequenceRecord(f"{part}/{name}", [f"{part}/{name}"])


STREETVIEW3D = Builder(
    layout=f"{STREETVIEW}/<id>/*.jpg",
    paper=base.CHUNK_RULE,
    released=f"chunks of {RELEASED_CHUNK}, the last one takes the rest",
    parts=streetview_parts,
    sequences=streetview_sequences,
    options=base.CHUNK_OPTIONS,
)
IMAGENET = Builder(
    layout="train/<class>/*.JPEG, or <class>/*.JPEG",
    paper="every image is a sequence",
    parts=imagenet_parts,
    sequences=imagenet_sequences,
)

"""ImageNet-1K: single images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.listing import folders_in, images_in
from fastmum.data.manifest import SequenceRecord


def parts(root: Path, options: Options) -> list[str]:
    """Classes: folders of `train/`, or of the root where there is no such folder."""
    if (root / "train").is_dir():
        return [f"train/{name}" for name in folders_in(root / "train")]
    return folders_in(root)


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """Every image by itself."""
    for name in images_in(root / part):
        yield SequenceRecord(f"{part}/{name}", [f"{part}/{name}"])


BUILDER = Builder(
    layout="train/<class>/*.JPEG, or <class>/*.JPEG",
    paper="every image is a sequence of its own",
    parts=parts,
    sequences=sequences,
)

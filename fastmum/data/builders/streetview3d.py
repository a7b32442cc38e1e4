"""3DStreetView: chunks of numbered photographs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.listing import folders_in, images_in
from fastmum.data.builders.scene import CHUNK_OPTIONS, CHUNK_RULE, chunks
from fastmum.data.manifest import SequenceRecord

RELEASED_CHUNK = 24


def parts(root: Path, options: Options) -> list[str]:
    """Folders of dataset_aligned."""
    return folders_in(root / "dataset_aligned")


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The folder in chunks."""
    folder = f"dataset_aligned/{part}"
    frames = [f"{folder}/{name}" for name in images_in(root / folder)]
    yield from chunks(SequenceRecord(part, frames), options, RELEASED_CHUNK)


BUILDER = Builder(
    layout="dataset_aligned/<id>/*.jpg",
    paper=CHUNK_RULE,
    released=f"chunks of {RELEASED_CHUNK}, the last one takes the rest",
    parts=parts,
    sequences=sequences,
    options=CHUNK_OPTIONS,
)

"""Manifests of the paper's size: 20 M frames in eleven multi-view data sets and ImageNet-1K."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmum.data.manifest import SequenceRecord, write_manifest
from fastmum.data.store import Place

SEQUENCES, IMAGES = 27_454, 1_281_167
PER_SHARD = 20_000  # images of 100 kB


def write_large_manifests(folder: Path, share: float = 1.0, packed: bool = False) -> list[Path]:
    """Write the manifests, or a share of each; the files, or shards of 20,000 images, that they name do not exist."""
    out = [folder / f"{name}.arrow" for name in (*"abcdefghijk", "imagenet")]
    for number, path in enumerate(out):
        records = _images(share) if path.stem == "imagenet" else _scenes(number, share)
        records = _in_shards(records) if packed else records
        write_manifest(path, records, dataset=path.stem, root=Path("/data"), metadata={"rule": "paper"})
    return out


def _in_shards(records: Iterator[SequenceRecord]) -> Iterator[SequenceRecord]:
    row = 0
    for record in records:
        shard, first = f"shard-{row // PER_SHARD:06d}.tar", row % PER_SHARD
        rows = range(first, first + len(record.frames))
        places = [Place(shard, 512 + 102_400 * i, 100_000, i * 2_654_435_761 % 2**32) for i in rows]
        yield record._replace(places={"path": places})
        row += len(rows)


def _scenes(number: int, share: float) -> Iterator[SequenceRecord]:
    names = [f"frame_{i:06d}.jpg" for i in range(101)]
    for i, length in enumerate(np.random.default_rng(number).integers(24, 101, int(share * SEQUENCES)).tolist()):
        yield SequenceRecord(f"scene_{i:05d}", [f"scene_{i:05d}/rgb/{name}" for name in names[:length]])


def _images(share: float) -> Iterator[SequenceRecord]:
    for i in range(int(share * IMAGES)):
        name = f"train/n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG"
        yield SequenceRecord(name, [name])

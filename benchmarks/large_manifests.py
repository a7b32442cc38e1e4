"""Manifests of the paper's size: 20 M frames in eleven multi-view data sets and ImageNet-1K."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmum.data.manifest import SequenceRecord, write_manifest

SEQUENCES, IMAGES = 27_454, 1_281_167


def write_large_manifests(folder: Path, share: float = 1.0) -> list[Path]:
    """Write the manifests, or a share of each; the files that they name do not exist."""
    out = [folder / f"{name}.arrow" for name in (*"abcdefghijk", "imagenet")]
    for number, path in enumerate(out[:-1]):
        write_manifest(path, _scenes(number, share), dataset=path.stem, root=Path("/data"), metadata={"rule": "paper"})
    write_manifest(out[-1], _images(share), dataset="imagenet", root=Path("/data"), metadata={"rule": "paper"})
    return out


def _scenes(number: int, share: float) -> Iterator[SequenceRecord]:
    names = [f"frame_{i:06d}.jpg" for i in range(101)]
    for i, length in enumerate(np.random.default_rng(number).integers(24, 101, int(share * SEQUENCES)).tolist()):
        yield SequenceRecord(f"scene_{i:05d}", [f"scene_{i:05d}/rgb/{name}" for name in names[:length]])


def _images(share: float) -> Iterator[SequenceRecord]:
    for i in range(int(share * IMAGES)):
        name = f"train/n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG"
        yield SequenceRecord(name, [name])

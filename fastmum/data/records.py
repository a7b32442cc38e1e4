"""Sequences and frames of a manifest as they were written into it."""

import functools
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self

import numpy as np

from fastmum.data import remote
from fastmum.data.depth import SIDES, DepthFormat
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifest, SequenceRecord
from fastmum.data.manifest_writer import FILES
from fastmum.data.store import WHOLE, Place, StoredPath, is_url


class Source(NamedTuple):
    """A manifest in a task."""

    given: str | Path  # path or URL
    checksum: str
    root: str  # here; on other nodes it may be moved

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        return cls(manifest.given, manifest.checksum, str(manifest.root))


@functools.lru_cache(maxsize=1)
def open_source(source: Source) -> Manifest:
    """Open the manifest, once for consecutive tasks of a process; DataError if it was replaced in the meantime."""
    manifest = Manifest(source.given)
    if manifest.checksum != source.checksum:
        raise DataError(f"'{source.given}' was replaced while it was read; run the command again")
    return manifest


def columns_of(manifest: Manifest) -> list[str]:
    """The columns of files that any frame has, of "path", "depth", "mask", "side"."""
    has_sides = any(reader in SIDES for reader in manifest.depth_readers)
    return [name for name in FILES if name == "path" or (has_sides if name == "side" else manifest.known[name])]


def first_rows(manifest: Manifest) -> np.ndarray:
    """For every row the first one of the same image, (frames,) int64: sequences may have images in common."""
    folder, file = (column.indices.to_numpy() for column in manifest.folder_and_file)
    pairs = folder.astype(np.int64) * (int(file.max()) + 1) + file
    _, first, which = np.unique(pairs, return_index=True, return_inverse=True)
    return first[which]


def new_manifest(source: Manifest, out: Path) -> Path:
    """The path in a folder for a manifest of the same name; DataError: it is that manifest itself."""
    made = out / f"{source.stem}.arrow"
    if made.exists() and made.samefile(source.path):
        raise DataError(f"--out is '{out}', where the manifest would be replaced; give another folder")
    return made


def check_names(manifests: Sequence[str]) -> None:
    """DataError: two manifests have the same name, so that one would replace the other in a common folder."""
    if len({Path(file).stem for file in manifests}) < len(manifests):
        raise DataError("two of the manifests have the same name; rename one, or give each another --out")


def metadata_of(manifest: Manifest) -> dict[str, Any]:
    """How its sequences were made, without what is true of that file only."""
    return {k: v for k, v in manifest.metadata.items() if k not in ("counts", "root", "packed")}


def side_path(depth: str, reader: str) -> str:
    """Path of the file that reading a depth map needs, too; "" if it needs none."""
    return str(SIDES[reader](Path(depth))) if depth and reader in SIDES else ""


def record(manifest: Manifest, sequence: int, rows: np.ndarray) -> SequenceRecord:
    """Some rows of a sequence, without places."""
    scene, name = manifest.scene_names(np.array([sequence]))[0], manifest.sequence_name(sequence)
    dataset = manifest.datasets[manifest.dataset_of[sequence]]
    made = SequenceRecord(name, manifest.paths("path", rows), dataset=dataset, scene=scene if scene != name else None)
    if manifest.known["pose"] or manifest.known["intrinsics"]:
        intrinsics, poses = zip(*map(manifest.camera_arrays, rows.tolist()), strict=True)
        made = made._replace(poses=_stacked(poses, (4, 4)), intrinsics=_stacked(intrinsics, (4,)))
    if manifest.known["mask"]:
        made = made._replace(masks=manifest.paths("mask", rows))
    if manifest.known["depth"] and any(depths := manifest.paths("depth", rows)):
        formats = [manifest.depth_format(row) for row in rows.tolist()]
        format = next(each for each in formats if each is not None)
        units = np.array([format.unit if each is None else each.unit for each in formats], np.float64)
        sides = [side_path(depth, format.reader) for depth in depths]
        made = made._replace(depths=depths, depth_format=format, depth_units=units, sides=sides if any(sides) else None)
    return made


def _stacked(values: Sequence[np.ndarray | None], shape: tuple[int, ...]) -> np.ndarray | None:
    """(n, *shape) float32, NaN where a value is None; None if all are."""
    unknown = np.full(shape, np.nan, np.float32)
    return np.stack([unknown if v is None else v for v in values]) if any(v is not None for v in values) else None


class Frame:
    """The files of a frame, and its name in a shard."""

    def __init__(self, manifest: Manifest, row: int) -> None:
        self.manifest, self.row = manifest, row
        self._sequence = int(manifest.sequence_of(row))
        depth: Path | None
        self._format: DepthFormat | None
        depth, self._format = manifest.depth_file(row) or (None, None)
        self.files: dict[str, Path] = {"path": manifest.file(row)}
        if depth is not None:
            self.files["depth"] = depth
        if (mask := manifest.mask_file(row)) is not None:
            self.files["mask"] = mask
        side = SIDES[self.reader](depth) if depth is not None and self.reader in SIDES else None
        side = getattr(depth, "side", None) or side
        if side is not None and (side := _existing(side)) is not None:
            self.files["side"] = side

    @property
    def reader(self) -> str:
        """Of its depth map, "" if it has none."""
        return self._format.reader if self._format else ""

    @property
    def side(self) -> str:
        """Path below the root of the file that reading the depth map needs, too; "" if it needs none."""
        return side_path(self.manifest.paths("depth", np.array([self.row]))[0], self.reader)

    @cached_property
    def key(self) -> str:
        """Data set, sequence and number: the name of the frame in a shard, without a suffix."""
        dataset = self.manifest.datasets[self.manifest.dataset_of[self._sequence]]
        whole = PurePosixPath(dataset, self.manifest.sequence_name(self._sequence).lstrip("/"))
        parts = ["__" if part == ".." else part for part in whole.parts if part != "/"]
        return "/".join([*parts, f"{self.row - int(self.manifest.starts[self._sequence]):06d}"])

    def described(self, scale: tuple[float, float]) -> dict[str, Any]:
        """Camera and format of the depth map; `scale` is the size of the stored image over that of the file."""
        intrinsics, pose = self.manifest.camera_arrays(self.row)
        known: dict[str, Any] = {}
        if intrinsics is not None:
            known["intrinsics"] = _numbers(intrinsics * np.tile(np.array(scale, np.float32), 2))
        if pose is not None:
            known["camera_from_world"] = _numbers(pose[:3])
        if self._format is not None:
            known["depth"] = self._format._asdict()
        return known


def _existing(file: Path) -> Path | None:
    """A file with its place, None if there is none; DataError if its store fails."""
    place = getattr(file, "place", None)
    if place is not None and place.length != WHOLE:  # a member of an archive
        return file
    if is_url(url := str(file)):
        return StoredPath.at(url, Place(url)) if remote.exists(url) else None
    return Path(file) if os.path.isfile(file) else None


def _numbers(values: np.ndarray) -> list[float]:
    """The shortest decimals that round to these float32 numbers."""
    return [float(str(value)) for value in values.astype(np.float32).ravel()]

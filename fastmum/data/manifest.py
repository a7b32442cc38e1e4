"""Manifests: which frames make up which sequences, in one memory-mapped Arrow file.

One row per frame in one record batch; the rows of a sequence are consecutive. Optional columns are absent if no frame
has a value, and null for the frames that have none:

    dataset     dictionary<int16, string>
    sequence    dictionary<int32, string>; the index is the number of the sequence in the file
    path        struct<folder: dictionary<int32, string>, file: dictionary<int32, string>>, relative to the root
    scene       dictionary<int32, string>, optional: what the sequence shows, if several show the same
    pose        fixed_size_list<float>[12], optional: upper 3 x 4 of camera_from_world, OpenCV axes
    intrinsics  fixed_size_list<float>[4], optional: fx fy cx cy in pixels of the upright image, pixel centres at +0.5
    depth       like path, and format: dictionary<int16, string> (JSON), unit: double; optional
    mask        like path, optional

Manifests of files in archives (`fastmum.data.store`) are of version 3 and have, for `path`, `depth` and `mask`:

    path_archive  run_end_encoded<int64, string>; path of the archive relative to the root, "" for loose files
    path_place    struct<offset: int64, length: int32, check: uint32>; bytes of the archive, a negative length that of
                  deflated bytes; CRC-32 of the 512 bytes in front of it (.tar) or of the content (.zip)
    side          like path, with side_archive and side_place; of files that reading the depth maps needs, too

`dataset`, `sequence` and `scene` are run_end_encoded<int64, string> in these. Manifests without archives are of version
2, without these columns; both versions are read.

Columns are not compressed but mapped, and shared by processes. Opening a file compares its checksum, which covers every
byte, and then checks that all numbers lie in their dictionaries. In version 3 the rows are not read then: each block of
1,024 has a checksum, which is compared when a row of it is used first.
"""

import itertools
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastmum.data import store
from fastmum.data.depth import SIDES, DepthFormat
from fastmum.data.errors import DataError
from fastmum.data.manifest_columns import BUILD, RUNS, Runs, changes, check_bounds, map_columns
from fastmum.data.manifest_writer import (
    BLOCK_ROWS,
    BLOCKS_KEY,
    METADATA_KEY,
    OPTIONAL,
    PLACE,
    block_bytes,
    block_digest,
    row_buffers,
)  # fmt: skip
from fastmum.data.manifest_writer import Counts as Counts  # public here
from fastmum.data.manifest_writer import SequenceRecord as SequenceRecord
from fastmum.data.manifest_writer import write_manifest as write_manifest
from fastmum.data.remote import local_copy
from fastmum.data.store import Handle, Place, StoredPath, is_url, join, place_of
from fastmum.files import expand_user


class Manifest:
    """A memory-mapped manifest; pickled as its path.

    DataError: a file that is missing, not a manifest, damaged or of another version.

    Args:
        path: of the file; one of a URL is copied to the cache (`$FASTMUM_CACHE`).
        roots: folders or URLs by name of a data set, that its files were moved to (`data.roots`); names without an
            entry are looked up in the environment (`FASTMUM_ROOT_CO3D`).

    Attributes:
        stem: name of the file without its suffix.
        given: the path, or the URL whose content `path` has.
        root: folder or URL that paths are relative to.
        metadata: rule, options, seed, counts, source ...
        checksum: of the whole file, hexadecimal.
        starts: (num_sequences + 1,) int64; the rows of sequence i are starts[i]:starts[i + 1].
        dataset_of: (num_sequences,) int16, index into `datasets`.
        known: frames that have a pose, intrinsics, depth, mask.
    """

    def __init__(self, path: str | Path, roots: Mapping[str, str] | None = None) -> None:
        self.stem = Path(str(path)).stem
        self.path = local_copy(path) if is_url(path) else expand_user(path)
        self.given, self._roots = str(path) if is_url(path) else self.path, roots
        mapped, batch, schema, self.checksum = map_columns(self.path)
        self.num_frames: int = batch.num_rows
        self._columns: dict[str, Any] = {name: batch[name] for name in batch.schema.names}
        self._blocks = schema.get(BLOCKS_KEY)
        if self._blocks is not None:
            self._file, self._base = Handle(str(self.path)), pa.py_buffer(mapped).address
            self._rows = [(buffer.address - self._base, buffer.size, bits) for buffer, bits in row_buffers(batch)]
            self._unread = np.ones(-(-self.num_frames // BLOCK_ROWS), bool)
        try:
            self.metadata: dict[str, Any] = json.loads(schema[METADATA_KEY])
            root = str(self.metadata["root"])
            check_bounds(batch)
            for name, column in self._columns.items():
                if column.type == RUNS:
                    self._columns[name] = Runs(column, self.num_frames)
            self._read_sequences()
        except (KeyError, TypeError, ValueError) as error:  # Arrow's errors are ValueErrors
            raise DataError(f"'{self.path}' is not a manifest ({error}); {BUILD}") from None
        root = next(filter(None, (moved_root(name, roots or {}) for name in self.datasets)), root)
        if not is_url(root) and not os.path.isabs(root) and is_url(self.given):
            root = join(str(self.given).rpartition("/")[0], root)
        self.root: Path = StoredPath(root) if is_url(root) else self.path.parent / root
        # The pages read so far are not needed again and no longer count as this process's memory.
        mapped.madvise(mmap.MADV_DONTNEED)
        mapped.madvise(mmap.MADV_RANDOM)
        self.known = {name: self._known(name) for name in OPTIONAL}

    def _check(self, rows: np.ndarray | slice = slice(None)) -> None:
        """Compare the checksums of rows that are used for the first time; DataError: they are damaged."""
        if self._blocks is None:
            return
        unread = self._unread if isinstance(rows, slice) else self._unread[rows // BLOCK_ROWS]
        if not unread.any():
            return
        numbers = np.flatnonzero(self._unread) if isinstance(rows, slice) else np.unique(rows // BLOCK_ROWS)
        for block in numbers.tolist():
            pieces = []
            for start, size, bits in self._rows:
                first, end = block_bytes(block, bits)
                pieces.append(os.pread(self._file.number, min(end, size) - first, start + first))
            if self._blocks[16 * block : 16 * block + 16] != block_digest(pieces).encode():
                raise DataError(f"the manifest '{self.path}' is damaged; restore it, or {BUILD} again")
            self._unread[block] = False

    def _numbers(self, array: pa.Array, rows: np.ndarray) -> np.ndarray:
        """Numbers of rows (of a dictionary: indices); in version 3 by `pread`, so that no pages of rows are mapped."""
        array = array.indices if pa.types.is_dictionary(array.type) else array
        if self._blocks is None:
            return array.to_numpy()[rows]
        kind = np.dtype(array.type.to_pandas_dtype())
        start, width, number = array.buffers()[1].address - self._base, kind.itemsize, self._file.number
        return np.frombuffer(b"".join([os.pread(number, width, start + width * row) for row in rows.tolist()]), kind)

    def _texts(self, array: pa.DictionaryArray, rows: np.ndarray) -> list[str]:
        """Values of rows."""
        return array.dictionary.take(pa.array(self._numbers(array, rows))).to_pylist()

    def _read_sequences(self) -> None:
        """Set `num_sequences`, `starts`, `datasets` and `dataset_of`; ValueError if rows are not consecutive."""
        sequence, dataset = self._columns["sequence"], self._columns["dataset"]
        self.datasets: tuple[str, ...]
        if isinstance(sequence, Runs) and isinstance(dataset, Runs):
            self._names, self.num_sequences = sequence.values, len(sequence.values)
            self.starts = np.append(0, sequence.ends)
            names = dataset.values.dictionary_encode()
            self.datasets = tuple(names.dictionary.to_pylist())
            self.dataset_of = names.indices.to_numpy().astype(np.int16)[dataset.runs(self.starts[:-1])]
            return
        self._names, self.num_sequences = sequence.dictionary, len(sequence.dictionary)
        numbers = sequence.indices.to_numpy()
        starts = changes(numbers)
        if not np.array_equal(numbers[starts], np.arange(self.num_sequences)):
            raise ValueError("the rows of a sequence are not consecutive")
        self.starts = np.append(starts, self.num_frames)
        self.datasets = tuple(dataset.dictionary.to_pylist())
        self.dataset_of = dataset.indices.to_numpy()[self.starts[:-1]]

    @classmethod
    def open(cls, path: str | Path) -> "Manifest":
        """`Manifest(path)`, under the name of other packages that map files."""
        return cls(path)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return Manifest, (self.given, self._roots)

    def sequence_name(self, sequence: int) -> str:
        """Name of a sequence, unique in its data set."""
        return self._names[sequence].as_py()

    def scene_names(self, sequences: np.ndarray) -> list[str]:
        """Names of what sequences show, unique in their data sets; those of the sequences if each shows its own."""
        if "scene" not in self._columns:
            return self._names.take(pa.array(sequences)).to_pylist()
        scene, rows = self._columns["scene"], self.starts[sequences]
        return scene.take(rows) if isinstance(scene, Runs) else scene.take(pa.array(rows)).to_pylist()

    def sequence_of(self, rows: int | np.ndarray) -> Any:
        """Numbers of the sequences that contain the rows."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def file(self, row: int) -> Path:
        """Absolute path of a frame."""
        return self.files([row])[0]

    def files(self, rows: Sequence[int] | np.ndarray) -> list[Path]:
        """Absolute paths of frames."""
        return self.column_files("path", np.asarray(rows, np.int64))

    def has_archives(self, column: str) -> bool:
        """Whether files of a column ("path", "depth", "mask", "side") are in archives."""
        return f"{column}_archive" in self._columns

    def places(self, column: str, rows: np.ndarray) -> list[Place | None]:
        """Where the files of a column ("path", "depth", "mask", "side") are in archives, None for loose ones."""
        if f"{column}_archive" not in self._columns:
            return [None] * len(rows)
        self._check(rows)
        archives = self._columns[f"{column}_archive"].take(rows)
        fields = (self._numbers(self._columns[f"{column}_place"].field(key), rows).tolist() for key in PLACE)
        return [
            Place(join(self.root, archive), offset, abs(length), check, length < 0, -1 if length < 0 else length)
            if archive else None
            for archive, offset, length, check in zip(archives, *fields, strict=True)
        ]  # fmt: skip

    def column_files(self, column: str, rows: np.ndarray) -> list[Path]:
        """Absolute paths of the files of a column, which all rows have."""
        self._check(rows)
        struct = self._columns[column]
        pairs = zip(*(self._texts(struct.field(key), rows) for key in ("folder", "file")), strict=True)
        remote = is_url(self.root)
        if not (remote or store.stage or f"{column}_archive" in self._columns):
            return [Path(self.root, folder, file) for folder, file in pairs]
        found: list[Path] = []
        for (folder, file), place in zip(pairs, self.places(column, rows), strict=True):
            path = join(self.root, f"{folder}/{file}" if folder else file)
            loose = place is None and not remote and not store.stage
            found.append(Path(path) if loose else StoredPath.at(path, place or Place(path)))
        return found

    def camera_arrays(self, row: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Intrinsics (4,) float32 and camera_from_world (4, 4) float32 of a frame, None where unknown.

        Intrinsics are fx fy cx cy in pixels of the upright image, pixel centres at +0.5; axes are OpenCV's.
        """
        intrinsics, upper = self._value("intrinsics", row), self._value("pose", row)
        K = None if intrinsics is None else np.array(intrinsics, np.float32)
        return K, None if upper is None else np.array([*upper, 0, 0, 0, 1], np.float32).reshape(4, 4)

    def paths(self, column: str, rows: np.ndarray) -> list[str]:
        """Paths below the root of the files of a column ("path", "depth", "mask", "side"), "" for rows without one."""
        if (struct := self._columns.get(column)) is None:
            return [""] * len(rows)
        self._check(rows)
        pairs = zip(*(self._texts(struct.field(key), rows) for key in ("folder", "file")), strict=True)
        return [f"{folder}/{file}" if folder else file for folder, file in pairs]

    def depth_format(self, row: int) -> DepthFormat | None:
        """The format of the depth map of a frame, None if it has none."""
        depth = self._value("depth", row)
        return None if depth is None else DepthFormat(unit=depth["unit"], **json.loads(depth["format"]))

    def depth_file(self, row: int) -> tuple[Path, DepthFormat] | None:
        """Absolute path and format of the depth map of a frame.

        A path that is stored has its `side`, which may not exist; that of a plain path is among the folders.
        """
        if (depth := self._value("depth", row)) is None:
            return None
        file, format = depth["file"], DepthFormat(unit=depth["unit"], **json.loads(depth["format"]))
        side = (self._value("side", row) or {}).get("file")
        if side is None and isinstance(file, StoredPath) and format.reader in SIDES:
            path = str(SIDES[format.reader](file))
            side = StoredPath.at(path, Place(path))
        if side is not None:
            file = StoredPath.at(str(file), place_of(file), side)
        return file, format

    def mask_file(self, row: int) -> Path | None:
        """Absolute path of the mask of a frame."""
        mask = self._value("mask", row)
        return mask and mask["file"]

    def present(self, name: str) -> np.ndarray:
        """Which frames have a value in an optional column ("pose", "intrinsics", "depth", "mask"), (frames,) bool."""
        self._check()
        column = self._columns.get(name)
        absent = np.zeros(self.num_frames, bool)
        return absent if column is None else column.is_valid().to_numpy(zero_copy_only=False)

    @property
    def depth_readers(self) -> set[str]:
        """The readers of depth maps (`DepthFormat.reader`) that the frames need."""
        column = self._columns.get("depth")
        formats = [] if column is None else column.field("format").dictionary.to_pylist()
        return {json.loads(each)["reader"] for each in formats if each}

    def _value(self, name: str, row: int) -> Any:
        """A value of an optional column, with the absolute path of its file; None if it is unknown."""
        self._check(np.array([row]))
        value = self._columns[name][int(row)].as_py() if name in self._columns else None
        return value | {"file": self.column_files(name, np.array([row]))[0]} if isinstance(value, dict) else value

    def _known(self, name: str) -> int:
        column = self._columns.get(name)
        return 0 if column is None else len(column) - column.null_count

    @property
    def folder_and_file(self) -> tuple[pa.DictionaryArray, pa.DictionaryArray]:
        """Folders below the root, and file names, of all frames."""
        self._check()
        return self._columns["path"].field("folder"), self._columns["path"].field("file")

    def folders(self, column: str = "path") -> Iterator[tuple[Path, list[str]]]:
        """Every folder and the names of its files in a column ("path", "depth", "mask"), each once."""
        if (struct := self._columns.get(column)) is None:
            return
        self._check()
        folder, file = struct.field("folder"), struct.field("file")
        width = len(file.dictionary)
        pairs = folder.indices.to_numpy().astype(np.int64) * width + file.indices.to_numpy()
        pairs = np.unique(pairs[struct.is_valid().to_numpy(zero_copy_only=False)] if struct.null_count else pairs)
        ends = np.searchsorted(pairs, width * np.arange(1, len(folder.dictionary) + 1))
        for number, names in enumerate(np.split(pairs % width, ends[:-1])):
            if len(names):
                yield self.root / folder.dictionary[number].as_py(), file.dictionary.take(names).to_pylist()


def moved_root(dataset: str, roots: Mapping[str, str]) -> str | None:
    """The folder or URL that a data set was moved to by `data.roots` or the environment, None if it was not."""
    name = re.sub(r"\W", "_", dataset).upper()
    root = roots.get(dataset) or os.environ.get(f"FASTMUM_ROOT_{name}")
    return root if not root or is_url(root) else os.path.abspath(expand_user(root))


class Manifests(Manifest):
    """Several manifests concatenated, rows and sequences numbered through; data sets of the same name are one.

    What belongs to a file (path, root, metadata, known, folders) is that of `parts`.
    """

    def __init__(self, paths: Sequence[str | Path], roots: Mapping[str, str] | None = None) -> None:
        if not paths:
            raise DataError("no manifest was given; build one with `python -m fastmum.data.build`")
        self.parts = tuple(Manifest(path, roots) for path in paths)
        self._roots = roots
        self._first_row = np.cumsum([0, *(part.num_frames for part in self.parts)])
        self._first_sequence = np.cumsum([0, *(part.num_sequences for part in self.parts)])
        self.num_frames, self.num_sequences = int(self._first_row[-1]), int(self._first_sequence[-1])
        self.datasets = tuple(dict.fromkeys(itertools.chain.from_iterable(part.datasets for part in self.parts)))
        starts = [part.starts[:-1] + first for part, first in zip(self.parts, self._first_row, strict=False)]
        self.starts = np.append(np.concatenate(starts), self.num_frames)
        if unknown := sorted((roots or {}).keys() - set(self.datasets)):
            raise DataError(f"data.roots.{unknown[0]} is no data set; there are {', '.join(self.datasets)}")
        index = [np.array([self.datasets.index(name) for name in part.datasets], np.int16) for part in self.parts]
        self.dataset_of = np.concatenate([i[part.dataset_of] for i, part in zip(index, self.parts, strict=True)])

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return Manifests, ([part.given for part in self.parts], self._roots)

    def sequence_name(self, sequence: int) -> str:
        part = int(np.searchsorted(self._first_sequence, sequence, side="right")) - 1
        return self.parts[part].sequence_name(sequence - int(self._first_sequence[part]))

    def scene_names(self, sequences: np.ndarray) -> list[str]:
        return self._by_part(Manifest.scene_names, sequences, self._first_sequence)

    def files(self, rows: Sequence[int] | np.ndarray) -> list[Path]:
        return self._by_part(Manifest.files, np.asarray(rows, np.int64), self._first_row)

    def present(self, name: str) -> np.ndarray:
        return np.concatenate([part.present(name) for part in self.parts])

    @property
    def depth_readers(self) -> set[str]:
        return set().union(*(part.depth_readers for part in self.parts))

    def _by_part(self, values: Callable[[Manifest, np.ndarray], list], numbers: np.ndarray, first: np.ndarray) -> list:
        """Values of rows or sequences; `first` has the number of each part's first one."""
        which = np.searchsorted(first, numbers, side="right") - 1
        found = np.empty(len(numbers), object)
        for part in np.unique(which):
            mine = which == part
            found[mine] = values(self.parts[part], numbers[mine] - first[part])
        return found.tolist()

    def _value(self, name: str, row: int) -> Any:
        part = int(np.searchsorted(self._first_row, row, side="right")) - 1
        return self.parts[part]._value(name, int(row - self._first_row[part]))

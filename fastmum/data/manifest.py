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

Columns are not compressed but mapped, and shared by processes. Opening a file compares its checksum, which covers every
byte, and then checks that all numbers lie in their dictionaries.
"""

import itertools
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError
from fastmum.data.manifest_writer import DIGITS, METADATA_KEY, OPTIONAL, TEXT, VERSION, VERSION_KEY, WIDTHS, checksum
from fastmum.data.manifest_writer import Counts as Counts  # public here
from fastmum.data.manifest_writer import SequenceRecord as SequenceRecord
from fastmum.data.manifest_writer import write_manifest as write_manifest
from fastmum.files import expand_user, regular

BUILD = "build it with `python -m fastmum.data.build`"
NUMBERED, SMALL = pa.dictionary(pa.int32(), TEXT), pa.dictionary(pa.int16(), TEXT)
FILE = {"folder": NUMBERED, "file": NUMBERED}
TYPES = {
    "dataset": SMALL, "sequence": NUMBERED, "path": pa.struct(FILE), "scene": NUMBERED, "mask": pa.struct(FILE),
    "depth": pa.struct(FILE | {"format": SMALL, "unit": pa.float64()}),
    **{name: pa.list_(pa.float32(), width) for name, width in WIDTHS.items()},
}  # fmt: skip
REQUIRED = {"dataset", "sequence", "path"}


class Manifest:
    """A memory-mapped manifest; pickled as its path.

    DataError: a file that is missing, not a manifest, damaged or of another version.

    Attributes:
        root: folder that paths are relative to.
        metadata: rule, options, seed, counts, source ...
        checksum: of the whole file, hexadecimal.
        starts: (num_sequences + 1,) int64; the rows of sequence i are starts[i]:starts[i + 1].
        dataset_of: (num_sequences,) int16, index into `datasets`.
        known: frames that have a pose, intrinsics, depth, mask.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expand_user(path)
        mapped, batch, schema, self.checksum = _map(self.path)
        self.num_frames: int = batch.num_rows
        sequence = batch["sequence"]
        self._names = sequence.dictionary
        self.num_sequences: int = len(self._names)
        try:
            self.metadata: dict[str, Any] = json.loads(schema[METADATA_KEY])
            self.root = self.path.parent / self.metadata["root"]
            _check_bounds(batch)
            starts = _changes(sequence.indices.to_numpy())
            if not np.array_equal(sequence.indices.to_numpy()[starts], np.arange(self.num_sequences)):
                raise ValueError("the rows of a sequence are not consecutive")
        except (KeyError, TypeError, ValueError) as error:  # Arrow's errors are ValueErrors
            raise DataError(f"'{self.path}' is not a manifest ({error}); {BUILD}") from None
        self.starts = np.append(starts, self.num_frames)
        self.datasets: tuple[str, ...] = tuple(batch["dataset"].dictionary.to_pylist())
        self.dataset_of = batch["dataset"].indices.to_numpy()[self.starts[:-1]]
        # The pages read so far are not needed again and no longer count as this process's memory.
        mapped.madvise(mmap.MADV_DONTNEED)
        mapped.madvise(mmap.MADV_RANDOM)
        self._columns = {name: batch[name] for name in ("path", "scene", *OPTIONAL) if name in batch.schema.names}
        self.known = {name: self._known(name) for name in OPTIONAL}

    @classmethod
    def open(cls, path: str | Path) -> "Manifest":
        """`Manifest(path)`, under the name of other packages that map files."""
        return cls(path)

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        return Manifest, (self.path,)

    def sequence_name(self, sequence: int) -> str:
        """Name of a sequence, unique in its data set."""
        return self._names[sequence].as_py()

    def scene_names(self, sequences: np.ndarray) -> list[str]:
        """Names of what sequences show, unique in their data sets; those of the sequences if each shows its own."""
        if "scene" not in self._columns:
            return self._names.take(pa.array(sequences)).to_pylist()
        return self._columns["scene"].take(pa.array(self.starts[sequences])).to_pylist()

    def sequence_of(self, rows: int | np.ndarray) -> Any:
        """Numbers of the sequences that contain the rows."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def file(self, row: int) -> Path:
        """Absolute path of a frame."""
        return self.files([row])[0]

    def files(self, rows: Sequence[int] | np.ndarray) -> list[Path]:
        """Absolute paths of frames."""
        rows, path = pa.array(np.asarray(rows, np.int64)), self._columns["path"]
        pairs = zip(*(path.field(key).take(rows).to_pylist() for key in ("folder", "file")), strict=True)
        return [Path(self.root, folder, file) for folder, file in pairs]

    def camera_arrays(self, row: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Intrinsics (4,) float32 and camera_from_world (4, 4) float32 of a frame, None where unknown.

        Intrinsics are fx fy cx cy in pixels of the upright image, pixel centres at +0.5; axes are OpenCV's.
        """
        intrinsics, upper = self._value("intrinsics", row), self._value("pose", row)
        K = None if intrinsics is None else np.array(intrinsics, np.float32)
        return K, None if upper is None else np.array([*upper, 0, 0, 0, 1], np.float32).reshape(4, 4)

    def depth_file(self, row: int) -> tuple[Path, DepthFormat] | None:
        """Absolute path and format of the depth map of a frame."""
        if (depth := self._value("depth", row)) is None:
            return None
        return depth["file"], DepthFormat(unit=depth["unit"], **json.loads(depth["format"]))

    def mask_file(self, row: int) -> Path | None:
        """Absolute path of the mask of a frame."""
        mask = self._value("mask", row)
        return mask and mask["file"]

    def present(self, name: str) -> np.ndarray:
        """Which frames have a value in an optional column ("pose", "intrinsics", "depth", "mask"), (frames,) bool."""
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
        value = self._columns[name][row].as_py() if name in self._columns else None
        return value | {"file": self.root / value["folder"] / value["file"]} if isinstance(value, dict) else value

    def _known(self, name: str) -> int:
        column = self._columns.get(name)
        return 0 if column is None else len(column) - column.null_count

    @property
    def folder_and_file(self) -> tuple[pa.DictionaryArray, pa.DictionaryArray]:
        """Folders below the root, and file names, of all frames."""
        return self._columns["path"].field("folder"), self._columns["path"].field("file")

    def folders(self, column: str = "path") -> Iterator[tuple[Path, list[str]]]:
        """Every folder and the names of its files in a column ("path", "depth", "mask"), each once."""
        if (struct := self._columns.get(column)) is None:
            return
        folder, file = struct.field("folder"), struct.field("file")
        width = len(file.dictionary)
        pairs = folder.indices.to_numpy().astype(np.int64) * width + file.indices.to_numpy()
        pairs = np.unique(pairs[struct.is_valid().to_numpy(zero_copy_only=False)] if struct.null_count else pairs)
        ends = np.searchsorted(pairs, width * np.arange(1, len(folder.dictionary) + 1))
        for number, names in enumerate(np.split(pairs % width, ends[:-1])):
            if len(names):
                yield self.root / folder.dictionary[number].as_py(), file.dictionary.take(names).to_pylist()


def _map(path: Path) -> tuple[mmap.mmap, pa.RecordBatch, dict[bytes, bytes], str]:
    try:
        with open(regular(path), "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise DataError(f"there is no manifest '{path}'; {BUILD}") from None
    except OSError as error:
        raise DataError(f"the manifest '{path}' cannot be read ({error.strerror})") from None
    except ValueError:  # an empty file
        raise DataError(f"'{path}' is not a manifest; {BUILD}") from None
    try:
        places, digest = checksum(mapped)
        checked = places[0] != places[1]
        if checked and any(mapped[place : place + DIGITS] != digest for place in places):
            raise pa.ArrowInvalid("another checksum")
        reader = pa.ipc.open_file(pa.py_buffer(mapped))
        schema = reader.schema.metadata or {}
        version = schema.get(VERSION_KEY)
        if version is not None and version != str(VERSION).encode():
            found = version.decode(errors="replace")
            raise DataError(f"'{path}' has version {found}, but this fastmum reads version {VERSION}; {BUILD} again")
        if version is None or not checked or reader.num_record_batches != 1:
            raise pa.ArrowInvalid("not written by fastmum")
        types = {field.name: field.type for field in reader.schema}
        if not types.keys() >= REQUIRED or any(TYPES.get(name) != type for name, type in types.items()):
            raise pa.ArrowInvalid("other columns")
        return mapped, reader.get_batch(0), schema, digest.decode()
    except (pa.ArrowException, OSError):
        raise DataError(f"'{path}' is not a manifest, or is damaged or truncated; {BUILD} again") from None


def _check_bounds(batch: pa.RecordBatch) -> None:
    """Raise ValueError if a number lies outside its dictionary, or Arrow finds a column or a text invalid."""
    batch.validate()
    if not batch.num_rows:
        raise ValueError("it has no frames")
    for column in batch.columns:
        struct = pa.types.is_struct(column.type)
        for field in map(column.field, range(column.type.num_fields)) if struct else [column]:
            if pa.types.is_dictionary(field.type):
                field.dictionary.validate(full=True)
                numbers = field.indices.to_numpy()
                # As unsigned numbers, negative ones exceed all others.
                if numbers.view(f"u{numbers.itemsize}").max() >= len(field.dictionary):
                    raise ValueError("a number lies outside its dictionary")


def _changes(numbers: np.ndarray, block: int = 1 << 20) -> np.ndarray:
    """Rows where a new number begins, (n,) int64; computed in blocks that fit the processor's cache."""
    starts = [np.zeros(1, np.int64)]
    for begin in range(1, len(numbers), block):
        here = numbers[begin : begin + block]
        starts.append(begin + np.flatnonzero(here != numbers[begin - 1 : begin - 1 + len(here)]))
    return np.concatenate(starts)


class Manifests(Manifest):
    """Several manifests concatenated, rows and sequences numbered through; data sets of the same name are one.

    What belongs to a file (path, root, metadata, known, folders) is that of `parts`.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        if not paths:
            raise DataError("no manifest was given; build one with `python -m fastmum.data.build`")
        self.parts = tuple(Manifest(path) for path in paths)
        self._first_row = np.cumsum([0, *(part.num_frames for part in self.parts)])
        self._first_sequence = np.cumsum([0, *(part.num_sequences for part in self.parts)])
        self.num_frames, self.num_sequences = int(self._first_row[-1]), int(self._first_sequence[-1])
        self.datasets = tuple(dict.fromkeys(itertools.chain.from_iterable(part.datasets for part in self.parts)))
        starts = [part.starts[:-1] + first for part, first in zip(self.parts, self._first_row, strict=False)]
        self.starts = np.append(np.concatenate(starts), self.num_frames)
        index = [np.array([self.datasets.index(name) for name in part.datasets], np.int16) for part in self.parts]
        self.dataset_of = np.concatenate([i[part.dataset_of] for i, part in zip(index, self.parts, strict=True)])

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        return Manifests, ([part.path for part in self.parts],)

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

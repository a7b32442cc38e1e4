"""Manifests: which frames make up which sequences, in one memory-mapped Arrow file.

A row a frame, in one record batch; a sequence is a run of consecutive rows:

    dataset     dictionary<int16, string>
    sequence    dictionary<int32, string>; the index is the number of the sequence in the file
    path        struct<folder: dictionary<int32, string>, file: dictionary<int32, string>>, relative to the root
    pose        fixed_size_list<float>[12], optional: the upper 3 x 4 of world-to-camera, OpenCV axes
    intrinsics  fixed_size_list<float>[4], optional: fx fy cx cy in pixels

Nothing is compressed, so that opening reads the column of sequence numbers once and maps the rest: the pages of a file
are shared by all processes that have opened it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

from fastmum.data.errors import DataError

VERSION = 1
VERSION_KEY, METADATA_KEY = b"fastmum.manifest", b"fastmum.metadata"
# Arrow's "large" strings: those of one column may pass 2 GB.
TEXT = pa.large_string()


class ManifestError(DataError):
    """A manifest that cannot be read or written; the message is one line for the user."""


class SequenceRecord(NamedTuple):
    """One sequence, as builders yield it.

    Args:
        name: unique in its data set.
        frames: image paths relative to the root, in order, '/' between folders.
        poses: (n, 4, 4) float32 world-to-camera, OpenCV axes; NaN where a frame's is unknown.
        intrinsics: (n, 4) float32 fx fy cx cy in pixels of the file, before any EXIF rotation; NaN where unknown.
        dataset: only when a builder writes several.
    """

    name: str
    frames: Sequence[str]
    poses: np.ndarray | None = None
    intrinsics: np.ndarray | None = None
    dataset: str | None = None


class Counts(NamedTuple):
    """What a manifest holds."""

    sequences: int
    frames: int


def write_manifest(
    out: Path, records: Iterable[SequenceRecord], *, dataset: str, root: Path, metadata: dict[str, Any]
) -> Counts:
    """Write a manifest; equal arguments give equal bytes, and `out` is either whole or as it was.

    Records are streamed: what stays in memory are the names of sequences, folders and files.

    Args:
        out: the file; its folder must exist.
        records: the sequences; may be a generator.
        dataset: name of the data set of records that carry none.
        root: folder that the frames' paths begin at; kept as given, a relative one starts at the folder of `out`.
        metadata: rule, options, seed, source ...: whatever JSON can hold. The counts are added.

    Raises:
        ManifestError: no sequence at all, one that is not well formed (named), or a file that cannot be written.
    """
    out = Path(out)
    with _Spool(out.parent) as spool:
        for record in records:  # an error in here is not one of writing
            with _writing(out):
                spool.add(record, record.dataset or dataset)
        if not spool.sequences:
            raise ManifestError(f"there is no sequence to write into '{out}'")
        with _writing(out):
            batch = spool.batch()
            counts = Counts(len(spool.sequences), batch.num_rows)
            content = metadata | {"root": str(root), "counts": counts._asdict()}
            keys = {VERSION_KEY: str(VERSION), METADATA_KEY: json.dumps(content, sort_keys=True)}
            _write_whole(out, batch.replace_schema_metadata(keys))
    return counts


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ManifestError(f"'{out}' cannot be written ({error.strerror or error})") from None


def _write_whole(out: Path, batch: pa.RecordBatch) -> None:
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            with pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


class _Spool:
    """Columns on their way to the file, in temporary files that have no name and so cannot be left behind."""

    def __init__(self, folder: Path) -> None:
        self.sequences: list[str] = []
        self._folder = folder
        self._names: dict[str, set[str]] = {}  # of the sequences of each data set
        self._datasets: dict[str, int] = {}
        self._folders: dict[str, int] = {}
        self._files: dict[str, int] = {}
        self._rows = 0
        self._columns: dict[str, IO[bytes]] = {}

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *exc: object) -> None:
        for column in self._columns.values():
            column.close()

    def add(self, record: SequenceRecord, dataset: str) -> None:
        where = f"sequence '{record.name}' of {dataset}"
        n, number = len(record.frames), len(self.sequences)
        names = self._names.setdefault(dataset, set())
        if not record.name or not n:
            raise ManifestError(f"{where} has no {'frames' if record.name else 'name'}")
        if record.name in names:
            raise ManifestError(f"{where} appears twice; names must be unique in a data set")
        names.add(record.name)
        self.sequences.append(_text(record.name, where))
        folders, files = np.empty(n, np.int32), np.empty(n, np.int32)
        for i, path in enumerate(record.frames):
            folder, _, file = _text(path, where).rpartition("/")
            if not file or path.startswith("/") or ".." in folder.split("/"):
                raise ManifestError(f"{where} has the frame '{path}', which is not a path below the root")
            folders[i] = self._folders.setdefault(folder, len(self._folders))
            files[i] = self._files.setdefault(file, len(self._files))
        self._append("folder", folders)
        self._append("file", files)
        self._append("sequence", np.full(n, number, np.int32))
        self._append("dataset", np.full(n, self._datasets.setdefault(dataset, len(self._datasets)), np.int16))
        self._append_optional("pose", record.poses, (n, 4, 4), where)
        self._append_optional("intrinsics", record.intrinsics, (n, 4), where)
        self._rows += n

    def batch(self) -> pa.RecordBatch:
        """All rows; their buffers are maps of the temporary files."""
        folder = self._dictionary("folder", pa.int32(), self._folders)
        file = self._dictionary("file", pa.int32(), self._files)
        columns = {
            "dataset": self._dictionary("dataset", pa.int16(), self._datasets),
            "sequence": self._dictionary("sequence", pa.int32(), self.sequences),
            "path": pa.StructArray.from_arrays([folder, file], ["folder", "file"]),
        }
        for name, width in (("pose", 12), ("intrinsics", 4)):
            if name in self._columns:
                columns[name] = self._vectors(name, width)
        return pa.RecordBatch.from_pydict(columns)

    def _append(self, name: str, values: np.ndarray, before: int = 0) -> None:
        column = self._columns.get(name)
        if column is None:
            column = self._columns[name] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed by __exit__)
            column.truncate(before)  # zeros for the rows that lack this column
            column.seek(before)
        column.write(values.data)

    def _append_optional(self, name: str, values: np.ndarray | None, shape: tuple[int, ...], where: str) -> None:
        if values is None and name not in self._columns:
            return
        n, width = shape[0], 12 if name == "pose" else 4
        if values is None:
            flat = np.full((n, width), np.nan, np.float32)
        elif values.shape != shape:
            raise ManifestError(f"{where} has {name} of shape {values.shape}, but must have {shape}")
        else:
            flat = np.ascontiguousarray(values.reshape(n, -1)[:, :width], np.float32)
        known = np.isfinite(flat).all(1)
        self._append(name, np.where(known[:, None], flat, np.float32(0)), before=self._rows * 4 * width)
        self._append(f"{name} known", known.astype(np.uint8), before=self._rows)

    def _mapped(self, name: str, dtype: Any) -> np.ndarray:
        self._columns[name].flush()
        return np.memmap(self._columns[name], dtype, mode="r")

    def _dictionary(self, name: str, index: pa.DataType, values: Iterable[str]) -> pa.DictionaryArray:
        numbers = pa.Array.from_buffers(
            index, self._rows, [None, pa.py_buffer(self._mapped(name, index.to_pandas_dtype()))]
        )
        return pa.DictionaryArray.from_arrays(numbers, pa.array(values, TEXT))

    def _vectors(self, name: str, width: int) -> pa.FixedSizeListArray:
        known = np.packbits(self._mapped(f"{name} known", np.uint8), bitorder="little")
        floats = pa.py_buffer(self._mapped(name, np.float32))
        flat = pa.Array.from_buffers(pa.float32(), self._rows * width, [None, floats])
        return pa.Array.from_buffers(
            pa.list_(pa.float32(), width), self._rows, [pa.py_buffer(known)], children=[flat]
        )  # fmt: skip


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ManifestError(f"{where} has a name that is not UTF-8: {text!r}; rename it") from None
    return text


class Manifest:
    """A manifest, memory-mapped; pickled as its path.

    Args of the attributes:
        path: of the file.
        root: folder that frames lie below.
        metadata: rule, options, seed, counts, source ...
        datasets: names of the data sets.
        starts: (num_sequences + 1,) int64; the rows of sequence i are starts[i] .. starts[i + 1].
        dataset_of: (num_sequences,) int16, index into `datasets`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._map, batch, schema = _map(self.path)
        self.metadata: dict[str, Any] = json.loads(schema[METADATA_KEY])
        self.root = self.path.parent / self.metadata["root"]
        self.num_frames: int = batch.num_rows
        sequence, path_column = batch["sequence"], batch["path"]
        self._names = sequence.dictionary
        numbers = sequence.indices.to_numpy()
        self.num_sequences: int = len(self._names)
        self.starts = np.append(_changes(numbers), self.num_frames)
        self.datasets: tuple[str, ...] = tuple(batch["dataset"].dictionary.to_pylist())
        self.dataset_of = batch["dataset"].indices.to_numpy()[self.starts[:-1]]
        # What was read until here is not needed again: these pages no longer count as this process's.
        self._map.madvise(mmap.MADV_DONTNEED)
        self._map.madvise(mmap.MADV_RANDOM)
        self._folders, self._files = path_column.field("folder"), path_column.field("file")
        names = batch.schema.names
        self._pose = batch["pose"] if "pose" in names else None
        self._intrinsics = batch["intrinsics"] if "intrinsics" in names else None

    @classmethod
    def open(cls, path: str | Path) -> Manifest:
        """Map a manifest.

        Raises:
            ManifestError: a file that is missing, not a manifest, cut short or of another version.
        """
        return cls(path)

    def __reduce__(self) -> tuple[type[Manifest], tuple[Path]]:
        return Manifest, (self.path,)

    def sequence_name(self, sequence: int) -> str:
        """Name of a sequence, unique in its data set."""
        return self._names[sequence].as_py()

    def sequence_of(self, rows: int | np.ndarray) -> Any:
        """Numbers of the sequences that rows belong to."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def file(self, row: int) -> Path:
        """Absolute path of a frame."""
        return self.files([row])[0]

    def files(self, rows: Sequence[int] | np.ndarray) -> list[Path]:
        """Absolute paths of frames."""
        rows = pa.array(np.asarray(rows, np.int64))
        pairs = zip(self._folders.take(rows).to_pylist(), self._files.take(rows).to_pylist(), strict=True)
        return [Path(self.root, folder, file) for folder, file in pairs]

    def pose(self, row: int) -> np.ndarray | None:
        """(4, 4) float32 world-to-camera with OpenCV axes, None where unknown."""
        upper = _vector(self._pose, row)
        return None if upper is None else np.vstack([upper.reshape(3, 4), np.float32([0, 0, 0, 1])])

    def intrinsics(self, row: int) -> np.ndarray | None:
        """(4,) float32 fx fy cx cy in pixels, None where unknown."""
        return _vector(self._intrinsics, row)

    @property
    def num_poses(self) -> int:
        """Frames whose pose is known."""
        return 0 if self._pose is None else len(self._pose) - self._pose.null_count

    @property
    def num_intrinsics(self) -> int:
        """Frames whose intrinsics are known."""
        return 0 if self._intrinsics is None else len(self._intrinsics) - self._intrinsics.null_count

    def images(self) -> Iterator[tuple[Path, list[str]]]:
        """Every folder with the names of its images, each once, however many sequences it is in."""
        folders, files = self._folders.indices.to_numpy(), self._files.indices.to_numpy()
        width = len(self._files.dictionary)
        pairs = np.unique(folders.astype(np.int64) * width + files)
        ends = np.searchsorted(pairs, width * np.arange(1, len(self._folders.dictionary) + 1))
        for folder, names in enumerate(np.split(pairs % width, ends[:-1])):
            yield self.root / self._folders.dictionary[folder].as_py(), self._files.dictionary.take(names).to_pylist()


def _map(path: Path) -> tuple[mmap.mmap, pa.RecordBatch, dict[bytes, bytes]]:
    remedy = "build it with `python -m fastmum.data.build`"
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ManifestError(f"there is no manifest '{path}'; {remedy}") from None
    except OSError as error:
        raise ManifestError(f"the manifest '{path}' cannot be read ({error.strerror})") from None
    except ValueError:  # an empty file
        raise ManifestError(f"'{path}' is not a manifest; {remedy}") from None
    try:
        reader = pa.ipc.open_file(pa.py_buffer(mapped))
        schema = reader.schema.metadata or {}
        version = schema.get(VERSION_KEY)
        if version is not None and version != str(VERSION).encode():
            raise ManifestError(
                f"the manifest '{path}' has version {version.decode()}, but this fastmum reads {VERSION}; "
                "build it again with `python -m fastmum.data.build`"
            )
        if version is None or reader.num_record_batches != 1:
            raise pa.ArrowInvalid("not written by fastmum")
        return mapped, reader.get_batch(0), schema
    except (pa.ArrowInvalid, OSError):
        raise ManifestError(f"'{path}' is not a manifest, or is cut short; {remedy}") from None


def _changes(numbers: np.ndarray, block: int = 1 << 20) -> np.ndarray:
    """Where a new number begins, in blocks that stay in the processor's cache: (n,) int64."""
    starts = [np.zeros(1, np.int64)]
    for begin in range(1, len(numbers), block):
        here = numbers[begin : begin + block]
        starts.append(begin + np.flatnonzero(here != numbers[begin - 1 : begin - 1 + len(here)]))
    return np.concatenate(starts)


def _vector(column: pa.FixedSizeListArray | None, row: int) -> np.ndarray | None:
    values = column[row].as_py() if column is not None else None
    return None if values is None else np.array(values, np.float32)


class Manifests:
    """Several manifests one behind another, with numbers of rows and sequences that go on from one to the next.

    Data sets of the same name are one. Attributes and methods as in `Manifest`.

    Raises:
        ManifestError: no path at all, or what `Manifest.open` raises.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        if not paths:
            raise ManifestError("no manifest was given; build one with `python -m fastmum.data.build`")
        self.parts = tuple(Manifest.open(path) for path in paths)
        self._first_row = np.cumsum([0, *(part.num_frames for part in self.parts)])
        self._first_sequence = np.cumsum([0, *(part.num_sequences for part in self.parts)])
        self.num_frames, self.num_sequences = int(self._first_row[-1]), int(self._first_sequence[-1])
        self.datasets = tuple(dict.fromkeys(itertools.chain.from_iterable(part.datasets for part in self.parts)))
        starts = [part.starts[:-1] + first for part, first in zip(self.parts, self._first_row, strict=False)]
        self.starts = np.append(np.concatenate(starts), self.num_frames)
        merged = [np.array([self.datasets.index(name) for name in part.datasets], np.int16) for part in self.parts]
        self.dataset_of = np.concatenate(
            [index[part.dataset_of] for index, part in zip(merged, self.parts, strict=True)]
        )

    def __reduce__(self) -> tuple[type[Manifests], tuple[list[Path]]]:
        return Manifests, ([part.path for part in self.parts],)

    def sequence_name(self, sequence: int) -> str:
        """Name of a sequence, unique in its data set and manifest."""
        part = int(np.searchsorted(self._first_sequence, sequence, side="right")) - 1
        return self.parts[part].sequence_name(sequence - int(self._first_sequence[part]))

    def sequence_of(self, rows: int | np.ndarray) -> Any:
        """Numbers of the sequences that rows belong to."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def file(self, row: int) -> Path:
        """Absolute path of a frame."""
        part, row = self._part(row)
        return part.file(row)

    def files(self, rows: Sequence[int] | np.ndarray) -> list[Path]:
        """Absolute paths of frames."""
        rows = np.asarray(rows, np.int64)
        which = np.searchsorted(self._first_row, rows, side="right") - 1
        found = np.empty(len(rows), object)
        for part in np.unique(which):
            mine = which == part
            found[mine] = self.parts[part].files(rows[mine] - self._first_row[part])
        return found.tolist()

    def pose(self, row: int) -> np.ndarray | None:
        """(4, 4) float32 world-to-camera with OpenCV axes, None where unknown."""
        part, row = self._part(row)
        return part.pose(row)

    def intrinsics(self, row: int) -> np.ndarray | None:
        """(4,) float32 fx fy cx cy in pixels, None where unknown."""
        part, row = self._part(row)
        return part.intrinsics(row)

    def _part(self, row: int) -> tuple[Manifest, int]:
        part = int(np.searchsorted(self._first_row, row, side="right")) - 1
        return self.parts[part], int(row - self._first_row[part])

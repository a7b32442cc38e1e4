"""Writing manifests; `fastmum.data.manifest` describes the file and reads it."""

import contextlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError
from fastmum.data.store import Place
from fastmum.errors import writing
from fastmum.files import atomic_path

VERSION, STORED_VERSION = 2, 3  # of manifests of loose files, and of those with places in archives
VERSION_KEY, METADATA_KEY, CHECKSUM_KEY = b"fastmum.manifest", b"fastmum.metadata", b"fastmum.checksum"
BLOCKS_KEY, BLOCK_ROWS = b"fastmum.blocks", 1024  # checksums of blocks of rows, 16 hexadecimal digits each
MARK, DIGITS = b"xxh3_128:", 32  # the checksum in a file: hexadecimal digits after the mark
TEXT = pa.large_string()  # a column of Arrow's "large" strings may exceed 2 GB
WIDTHS = {"pose": 12, "intrinsics": 4}  # floats per frame
OPTIONAL = (*WIDTHS, "depth", "mask")
FILES = ("path", "depth", "mask", "side")  # columns of files
PLACE = {"offset": pa.int64(), "length": pa.int32(), "check": pa.uint32()}


class SequenceRecord(NamedTuple):
    """One sequence of n frames, as builders yield it. Paths are relative to the root, with '/' between folders."""

    name: str  # unique in its data set
    frames: Sequence[str]  # image paths, in order
    poses: np.ndarray | None = None  # (n, 4, 4) float32 camera_from_world, OpenCV axes; NaN where unknown
    intrinsics: np.ndarray | None = None  # (n, 4) float32 fx fy cx cy in pixels of the upright image; NaN where unknown
    dataset: str | None = None  # only if a builder writes several
    depths: Sequence[str] | None = None  # paths of depth maps, "" for frames that have none
    masks: Sequence[str] | None = None  # paths of masks (`read_mask`), "" for frames that have none
    depth_format: DepthFormat | None = None  # of all depth maps of the sequence
    depth_units: np.ndarray | None = None  # (n,) float64, replaces the format's `unit` where each frame has its own
    scene: str | None = None  # sequences of a scene are held out together; unique in its data set, None: the name
    sides: Sequence[str] | None = None  # paths of files that reading the depth maps needs, only if they have places
    # Of the columns "path", "depth", "mask", "side": where the files are, None for loose ones. Stores are relative to
    # the root.
    places: Mapping[str, Sequence[Place | None]] | None = None

    def select(self, rows: Sequence[int] | np.ndarray, name: str) -> "SequenceRecord":
        """Some of the frames as another sequence of the same scene."""
        whole = ("name", "dataset", "depth_format", "scene", "places")  # the other fields have a value for each frame
        known = {k: v for k, v in self._asdict().items() if v is not None and k not in whole}
        chosen: Any = {k: v[rows] if isinstance(v, np.ndarray) else [v[i] for i in rows] for k, v in known.items()}
        places = self.places and {column: [places[i] for i in rows] for column, places in self.places.items()}
        return self._replace(name=name, scene=self.scene or self.name, places=places, **chosen)


class Counts(NamedTuple):
    """Size of a manifest."""

    sequences: int
    frames: int


def write_manifest(
    out: Path, records: Iterable[SequenceRecord], *, dataset: str, root: Path, metadata: dict[str, Any]
) -> Counts:
    """Write a manifest atomically; equal arguments give equal bytes.

    Records are streamed; only the names of sequences, folders and files stay in memory. DataError: no sequence, an
    invalid one (named), or a file that cannot be written.

    Args:
        dataset: data set of the records that name none.
        root: folder that the frames' paths are relative to; stored as given, relative to the folder of `out`.
        metadata: rule, options, seed, source ...: JSON. The counts are added.
    """
    out = Path(out)
    with contextlib.closing(_Spool(out.parent)) as spool:
        for record in records:  # errors of the generator itself are not errors of writing
            with writing(out, DataError):
                spool.add(record, record.dataset or dataset)
        if not spool.sequences:
            raise DataError(f"there is no sequence to write into '{out}'")
        with writing(out, DataError):
            batch = spool.batch()
            counts = Counts(len(spool.sequences), batch.num_rows)
            content = json.dumps(metadata | {"root": str(root), "counts": counts._asdict()}, sort_keys=True)
            _write(out, batch, content)
    return counts


def _write(out: Path, batch: pa.RecordBatch, content: str) -> None:
    described = {CHECKSUM_KEY: MARK + b"0" * DIGITS, VERSION_KEY: str(VERSION), METADATA_KEY: content}
    if any(name.endswith("_place") for name in batch.schema.names):
        blocks = -(-batch.num_rows // BLOCK_ROWS)
        buffers = [(memoryview(buffer), bits) for buffer, bits in row_buffers(batch)]
        digests = [
            block_digest(view[slice(*block_bytes(block, bits))] for view, bits in buffers) for block in range(blocks)
        ]
        described |= {VERSION_KEY: str(STORED_VERSION), BLOCKS_KEY: "".join(digests)}
    batch = batch.replace_schema_metadata(described)
    with atomic_path(out) as partial, open(partial, "w+b") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        with mmap.mmap(file.fileno(), 0) as mapped:
            places, digest = checksum(mapped, BLOCKS_KEY in described)
            for place in places:
                mapped[place : place + DIGITS] = digest
        os.fsync(file.fileno())


def checksum(mapped: mmap.mmap, in_blocks: bool) -> tuple[tuple[int, int], bytes]:
    """Where a file has its checksum, in the schema at its start and at its end, and the right one.

    It is that of the whole file with zeros in these two places, and without the rows if they have checksums of their
    own (`in_blocks`). The places are equal, or -1, in other files.
    """
    first, last = mapped.find(MARK), mapped.rfind(MARK)
    if first == last:
        return (first, last), b""
    places = first + len(MARK), last + len(MARK)
    skipped = [(place, DIGITS) for place in places]
    if in_blocks:
        whole = pa.py_buffer(mapped)
        buffers = row_buffers(pa.ipc.open_file(whole).get_batch(0))
        skipped += [(buffer.address - whole.address, buffer.size) for buffer, _ in buffers]
    digest, at = xxhash.xxh3_128(), 0
    with memoryview(mapped) as view:
        for place, size in sorted(skipped):
            digest.update(view[at:place])
            digest.update(b"0" * DIGITS if place in places else b"")
            at = place + size
        digest.update(view[at:])
    return places, digest.hexdigest().encode()


def row_buffers(batch: pa.RecordBatch) -> list[tuple[pa.Buffer, int]]:
    """The buffers with a value for each row, and their bits per row."""

    def of(array: pa.Array) -> Iterator[tuple[pa.Buffer | None, int]]:
        kind = array.type
        if pa.types.is_run_end_encoded(kind):
            return
        yield array.buffers()[0] if array.null_count else None, 1  # a file has none if all values are known
        if pa.types.is_struct(kind):
            for i in range(kind.num_fields):
                yield from of(array.field(i))
        elif pa.types.is_fixed_size_list(kind):
            yield array.values.buffers()[1], kind.list_size * kind.value_type.bit_width
        else:
            yield array.buffers()[1], kind.index_type.bit_width if pa.types.is_dictionary(kind) else kind.bit_width

    found = [each for column in batch.columns for each in of(column)]
    return [(buffer.slice(0, -(-batch.num_rows * bits // 8)), bits) for buffer, bits in found if buffer is not None]


def block_bytes(block: int, bits: int) -> tuple[int, int]:
    """Where a block of rows begins and ends in a buffer with so many bits per row."""
    size = BLOCK_ROWS * bits // 8
    return block * size, (block + 1) * size


def block_digest(pieces: Iterable[bytes | memoryview]) -> str:
    """The checksum of a block of rows, from its piece of each buffer."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


class _Spool:
    """Columns in unnamed temporary files, which cannot be left over, until the number of rows is known."""

    def __init__(self, folder: Path) -> None:
        self.sequences: list[str] = []
        self._scenes: list[str | None] = []  # of the sequences, None where it has the sequence's name
        self._ends: list[int] = []  # rows where the sequences end
        self._datasets: list[str] = []  # of the sequences
        self._folder = folder
        self._names: dict[str, set[str]] = {}  # of the sequences of each data set
        self._values: dict[str, dict[str, int]] = {}  # values of dictionary columns and their indices
        self._rows = 0
        self._columns: dict[str, IO[bytes]] = {}

    def close(self) -> None:
        for column in self._columns.values():
            column.close()

    def add(self, record: SequenceRecord, dataset: str) -> None:
        where = f"sequence '{record.name}' of {dataset}"
        n, number = len(record.frames), len(self.sequences)
        names = self._names.setdefault(dataset, set())
        if not record.name or not n:
            raise DataError(f"{where} has no {'frames' if record.name else 'name'}")
        if record.name in names:
            raise DataError(f"{where} appears twice; names must be unique in a data set")
        names.add(record.name)
        self.sequences.append(_text(record.name, where))
        self._scenes.append(None if record.scene is None else _text(record.scene, where))
        self._datasets.append(dataset)
        self._ends.append(self._rows + n)
        self._append_paths("path", record.frames, where)
        self._append("sequence", np.full(n, number, np.int32))
        self._append("dataset", np.full(n, self._index("dataset", dataset), np.int16))
        for name, values in (("pose", record.poses), ("intrinsics", record.intrinsics)):
            self._append_vectors(name, values, n, where)
        for name in FILES:
            self._append_places(name, (record.places or {}).get(name), n)
        for name, paths in (("depth", record.depths), ("mask", record.masks), ("side", record.sides)):
            if paths is None and name not in self._columns:
                continue
            paths = [""] * n if paths is None else paths
            if len(paths) != n:
                raise DataError(f"{where} has {len(paths)} {name} paths for {n} frames")
            if any(paths) or name in self._columns:
                self._append(name, np.array([bool(path) for path in paths]))
                self._append_paths(name, paths, where)
                if name == "depth":
                    self._append_format(record, n, where)
        self._rows += n

    def _append(self, name: str, values: np.ndarray) -> None:
        if name not in self._columns:
            column = self._columns[name] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (see `close`)
            # Zeros for the earlier rows, which lack this column.
            column.seek(column.truncate(self._rows * (values.nbytes // len(values))))
        self._columns[name].write(values.data)

    def _append_paths(self, name: str, paths: Sequence[str], where: str) -> None:
        n = len(paths)
        folders, files = np.empty(n, np.int32), np.empty(n, np.int32)
        known_folders = self._values.setdefault(f"{name} folder", {})
        known_files = self._values.setdefault(f"{name} file", {})
        for i, path in enumerate(paths):
            folder, _, file = _text(path, where).rpartition("/")
            if (path or name == "path") and (not file or path.startswith("/") or ".." in folder.split("/")):
                raise DataError(f"{where} has the {name} '{path}', which is not a path below the root")
            folders[i] = known_folders.setdefault(folder, len(known_folders))
            files[i] = known_files.setdefault(file, len(known_files))
        self._append(f"{name} folder", folders)
        self._append(f"{name} file", files)

    def _append_places(self, name: str, places: Sequence[Place | None] | None, n: int) -> None:
        if not any(places or ()) and f"{name} archive" not in self._columns:
            return
        known = [place or Place("", length=0) for place in places or [None] * n]
        self._index(f"{name} archive", "")  # number 0, of loose files
        self._append(f"{name} archive", np.array([self._index(f"{name} archive", at.store) for at in known], np.int32))
        values = {
            "offset": [at.offset for at in known], "check": [at.check for at in known],
            "length": [-at.length if at.deflated else at.length for at in known],
        }  # fmt: skip
        for field, kind in PLACE.items():
            self._append(f"{name} {field}", np.array(values[field], kind.to_pandas_dtype()))

    def _append_vectors(self, name: str, values: np.ndarray | None, n: int, where: str) -> None:
        if values is None and name not in self._columns:
            return
        shape = (n, 4, 4) if name == "pose" else (n, 4)
        values = np.full(shape, np.nan, np.float32) if values is None else values
        if values.shape != shape:
            raise DataError(f"{where} has {name} of shape {values.shape}, but must have {shape}")
        flat = np.ascontiguousarray(values.reshape(n, -1)[:, : WIDTHS[name]], np.float32)
        known = np.asarray(np.isfinite(flat).all(1))
        if known.any() or name in self._columns:
            self._append(name, known)
            self._append(f"{name} values", np.where(known[:, None], flat, np.float32(0)))

    def _append_format(self, record: SequenceRecord, n: int, where: str) -> None:
        format = record.depth_format
        if format is None and record.depths is not None:
            raise DataError(f"{where} has depth maps, but no depth_format")
        fields = "" if format is None else json.dumps({k: v for k, v in format._asdict().items() if k != "unit"})
        units = np.full(n, 0.0 if format is None else format.unit) if record.depth_units is None else record.depth_units
        if units.shape != (n,):
            raise DataError(f"{where} has depth_units of shape {units.shape}, but must have {(n,)}")
        self._append("depth format", np.full(n, self._index("depth format", fields), np.int16))
        self._append("depth unit", np.ascontiguousarray(units, np.float64))

    def _index(self, name: str, value: str) -> int:
        values = self._values.setdefault(name, {})
        return values.setdefault(value, len(values))

    def batch(self) -> pa.RecordBatch:
        """All rows; the buffers are maps of the temporary files."""
        numbers = self._mapped("sequence", np.int32)
        sequences = pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(self.sequences, TEXT))
        columns: dict[str, pa.Array] = {"dataset": self._dictionary("dataset", np.int16), "sequence": sequences}
        columns["path"] = self._struct("path")
        scenes = [scene or name for scene, name in zip(self._scenes, self.sequences, strict=True)]
        if scenes != self.sequences:
            scene = pa.array(scenes, TEXT).dictionary_encode()
            of_rows = pa.array(scene.indices.to_numpy()[numbers])
            columns["scene"] = pa.DictionaryArray.from_arrays(of_rows, scene.dictionary)
        for name in OPTIONAL:
            if name in self._columns:
                columns[name] = self._vectors(name) if name in WIDTHS else self._struct(name)
        if any(f"{name} archive" in self._columns for name in FILES):
            self._add_places(columns, scenes)
        return pa.RecordBatch.from_pydict(columns)

    def _add_places(self, columns: dict[str, pa.Array], scenes: list[str]) -> None:
        """Columns of places; those that seldom change become runs, which a process reads at once."""
        ends = np.array(self._ends, np.int64)
        columns["sequence"] = pa.RunEndEncodedArray.from_arrays(pa.array(ends), pa.array(self.sequences, TEXT))
        columns["dataset"] = _runs(ends, self._datasets)
        if "scene" in columns:
            columns["scene"] = _runs(ends, scenes)
        if "side" in self._columns:
            columns["side"] = self._struct("side")
        for name in FILES:
            if f"{name} archive" not in self._columns:
                continue
            numbers, archives = self._mapped(f"{name} archive", np.int32), [*self._values[f"{name} archive"]]
            last = np.append(np.flatnonzero(numbers[1:] != numbers[:-1]), len(numbers) - 1)
            columns[f"{name}_archive"] = _runs(last + 1, [archives[i] for i in numbers[last]])
            fields = [pa.array(self._mapped(f"{name} {key}", kind.to_pandas_dtype())) for key, kind in PLACE.items()]
            columns[f"{name}_place"] = pa.StructArray.from_arrays(fields, list(PLACE))

    def _mapped(self, name: str, dtype: Any) -> np.ndarray:
        self._columns[name].flush()
        return np.memmap(self._columns[name], dtype, mode="r")

    def _dictionary(self, name: str, index: type) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(pa.array(self._mapped(name, index)), pa.array(self._values[name], TEXT))

    def _struct(self, name: str) -> pa.StructArray:
        fields = {key: self._dictionary(f"{name} {key}", np.int32) for key in ("folder", "file")}
        if name == "depth":
            fields["format"] = self._dictionary("depth format", np.int16)
            fields["unit"] = pa.array(self._mapped("depth unit", np.float64))
        null = None if name == "path" else pa.array(~self._mapped(name, bool))
        return pa.StructArray.from_arrays(list(fields.values()), list(fields), mask=null)

    def _vectors(self, name: str) -> pa.FixedSizeListArray:
        unknown = pa.array(~self._mapped(name, bool))
        values = pa.array(self._mapped(f"{name} values", np.float32))
        return pa.FixedSizeListArray.from_arrays(values, WIDTHS[name], mask=unknown)


def _runs(ends: np.ndarray, values: Sequence[str]) -> pa.RunEndEncodedArray:
    """Values of the rows up to each of `ends`; equal neighbours are one run."""
    kept = [i for i in range(len(values)) if i + 1 == len(values) or values[i] != values[i + 1]]
    return pa.RunEndEncodedArray.from_arrays(pa.array(ends[kept]), pa.array([values[i] for i in kept], TEXT))


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} has a name that is not UTF-8: {text!r}; rename it") from None
    return text

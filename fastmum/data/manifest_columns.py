"""The columns of a manifest: their types, and how they are mapped, checked and searched."""

import mmap
from pathlib import Path

import numpy as np
import pyarrow as pa

from fastmum.data.errors import DataError
from fastmum.data.manifest_writer import (
    BLOCKS_KEY,
    DIGITS,
    FILES,
    PLACE,
    STORED_VERSION,
    TEXT,
    VERSION,
    VERSION_KEY,
    WIDTHS,
    checksum,
)
from fastmum.files import regular

BUILD = "build it with `python -m fastmum.data.build`"
NUMBERED, SMALL = pa.dictionary(pa.int32(), TEXT), pa.dictionary(pa.int16(), TEXT)
FILE = {"folder": NUMBERED, "file": NUMBERED}
TYPES = {
    "dataset": SMALL, "sequence": NUMBERED, "path": pa.struct(FILE), "scene": NUMBERED, "mask": pa.struct(FILE),
    "depth": pa.struct(FILE | {"format": SMALL, "unit": pa.float64()}),
    **{name: pa.list_(pa.float32(), width) for name, width in WIDTHS.items()},
}  # fmt: skip
REQUIRED = {"dataset", "sequence", "path"}
RUNS = pa.run_end_encoded(pa.int64(), TEXT)
STORED_TYPES = TYPES | {"sequence": RUNS, "dataset": RUNS, "scene": RUNS, "side": pa.struct(FILE)} | {
    f"{name}_{kind}": type for name in FILES for kind, type in (("archive", RUNS), ("place", pa.struct(PLACE)))
}  # fmt: skip


def map_columns(path: Path) -> tuple[mmap.mmap, pa.RecordBatch, dict[bytes, bytes], str]:
    """Map a manifest, and compare its checksum: the memory, columns, metadata and checksum; DataError if it is none."""
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
        reader = pa.ipc.open_file(pa.py_buffer(mapped))
        schema = reader.schema.metadata or {}
        version = schema.get(VERSION_KEY)
        if version is not None and version not in (b"%d" % VERSION, b"%d" % STORED_VERSION):
            found, known = version.decode(errors="replace"), f"versions {VERSION} and {STORED_VERSION}"
            raise DataError(f"'{path}' has version {found}, but this fastmum reads {known}; {BUILD} again")
        places, digest = checksum(mapped, BLOCKS_KEY in schema)
        if version is None or places[0] == places[1] or reader.num_record_batches != 1:
            raise pa.ArrowInvalid("not written by fastmum")
        if any(mapped[place : place + DIGITS] != digest for place in places):
            raise pa.ArrowInvalid("another checksum")
        types = {field.name: field.type for field in reader.schema}
        allowed = TYPES if version == b"%d" % VERSION else STORED_TYPES
        if not types.keys() >= REQUIRED or any(allowed.get(name) != type for name, type in types.items()):
            raise pa.ArrowInvalid("other columns")
        return mapped, reader.get_batch(0), schema, digest.decode()
    except DataError:
        raise
    except (pa.ArrowException, OSError, IndexError, ValueError):
        raise DataError(f"'{path}' is not a manifest, or is damaged or truncated; {BUILD} again") from None


def check_bounds(batch: pa.RecordBatch) -> None:
    """Raise ValueError if a number lies outside its dictionary, or Arrow finds a column or a text invalid."""
    batch.validate()
    if not batch.num_rows:
        raise ValueError("it has no frames")
    if any(column.type == RUNS for column in batch.columns):
        return  # numbers are checked when they are used
    for column in batch.columns:
        struct = pa.types.is_struct(column.type)
        for field in map(column.field, range(column.type.num_fields)) if struct else [column]:
            if pa.types.is_dictionary(field.type):
                field.dictionary.validate(full=True)
                numbers = field.indices.to_numpy()
                # As unsigned numbers, negative ones exceed all others.
                if numbers.view(f"u{numbers.itemsize}").max() >= len(field.dictionary):
                    raise ValueError("a number lies outside its dictionary")


class Runs:
    """A run-end encoded column: `values` of the rows up to each of `ends`. ValueError: the runs are invalid."""

    def __init__(self, column: pa.RunEndEncodedArray, rows: int) -> None:
        self.values, self.ends = column.values, column.run_ends.to_numpy()
        self.values.validate(full=True)
        ends = self.ends
        if not len(ends) or ends[0] < 1 or ends[-1] != rows or not (ends[1:] > ends[:-1]).all():
            raise ValueError("its runs are no runs of rows")

    def runs(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the runs that contain the rows."""
        return np.searchsorted(self.ends, rows, side="right")

    def take(self, rows: np.ndarray) -> list[str]:
        """Values of rows."""
        return self.values.take(pa.array(self.runs(rows))).to_pylist()


def changes(numbers: np.ndarray, block: int = 1 << 20) -> np.ndarray:
    """Rows where a new number begins, (n,) int64; computed in blocks that fit the processor's cache."""
    starts = [np.zeros(1, np.int64)]
    for begin in range(1, len(numbers), block):
        here = numbers[begin : begin + block]
        starts.append(begin + np.flatnonzero(here != numbers[begin - 1 : begin - 1 + len(here)]))
    return np.concatenate(starts)

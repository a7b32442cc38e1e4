"""Archives of NumPy arrays as data sets publish them, also pickled ones; no code is run."""

import codecs
import contextlib
import zipfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.format import read_array, read_array_header_1_0, read_array_header_2_0, read_magic

from fastmum.data.errors import DataError
from fastmum.errors import first_line, some_names
from fastmum.files import regular, unpickle

# What pickled arrays are made of, under the names of NumPy 1 and 2.
ARRAYS: dict[str, Any] = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype, "_codecs.encode": codecs.encode}
for _core in ("numpy.core", "numpy._core"):
    ARRAYS |= {f"{_core}.multiarray._reconstruct": np.empty(0).__reduce__()[0]}
    ARRAYS |= {f"{_core}.multiarray.scalar": np.float64(0).__reduce__()[0]}


def read_archive(file: Path, names: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an .npz, of the dictionary in an .npy, or of its fields, also pickled ones; no code is run.

    With `names` only these are read. DataError: the file cannot be read, or lacks one of them.
    """
    with _decoding(file) as stream:
        if file.suffix == ".npy":
            content = _read_array(stream)
            found = {key: content[key] for key in content.dtype.names} if content.dtype.names else dict(content.item())
            return {name: found[name] for name in _held(found, names)}
        with zipfile.ZipFile(stream) as archive:
            held = _held([name.removesuffix(".npy") for name in archive.namelist()], names)
            return {name: _read_array(archive.open(f"{name}.npy")) for name in held}


def read_pickle(file: Path) -> Any:
    """The content of a pickle of Python's containers, numbers and texts, and NumPy's arrays; no code is run.

    DataError: the file cannot be read, or holds anything else.
    """
    with _decoding(file) as stream:
        return unpickle(stream, ARRAYS)


@contextlib.contextmanager
def _decoding(file: Path) -> Iterator[IO[bytes]]:
    try:
        with regular(file).open("rb") as stream:
            yield stream
    except Exception as error:  # unpickling raises any error
        raise DataError(f"archive '{file}' cannot be read ({first_line(error) or repr(error)})") from None


def _held(held: Collection[str], names: Iterable[str]) -> Collection[str]:
    """The names, or all that are held if none is given; ValueError: some are not held."""
    if missing := [name for name in names if name not in held]:
        raise ValueError(f"it has no {some_names(missing)}")
    return list(names) or held


def _read_array(stream: IO[bytes]) -> np.ndarray:
    header = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}[read_magic(stream)]
    shape, _, dtype = header(stream)
    if dtype.hasobject:
        return unpickle(stream, ARRAYS).reshape(shape)
    stream.seek(0)
    return read_array(stream, allow_pickle=False)

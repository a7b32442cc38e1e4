"""Archives of NumPy arrays as data sets publish them, also pickled ones; no code is run."""

import codecs
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.format import read_array, read_array_header_1_0, read_array_header_2_0, read_magic

from fastmum.data.errors import DataError
from fastmum.errors import first_line
from fastmum.files import regular, unpickle

# What pickled arrays are made of, under the names of NumPy 1 and 2.
ARRAYS: dict[str, Any] = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype, "_codecs.encode": codecs.encode}
for _core in ("numpy.core", "numpy._core"):
    ARRAYS |= {f"{_core}.multiarray._reconstruct": np.empty(0).__reduce__()[0]}
    ARRAYS |= {f"{_core}.multiarray.scalar": np.float64(0).__reduce__()[0]}


def read_archive(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz, or of the dictionary in an .npy, also pickled ones as published; no code is run."""
    try:
        if file.suffix == ".npy":
            with open(regular(file), "rb") as stream:
                return dict(_read_array(stream).item())
        with zipfile.ZipFile(regular(file)) as archive:
            return {name.removesuffix(".npy"): _read_array(archive.open(name)) for name in archive.namelist()}
    except Exception as error:  # unpickling raises any error
        raise DataError(f"archive '{file}' cannot be read ({first_line(error) or repr(error)})") from None


def _read_array(stream: IO[bytes]) -> np.ndarray:
    header = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}[read_magic(stream)]
    shape, _, dtype = header(stream)
    if dtype.hasobject:
        return unpickle(stream, ARRAYS).reshape(shape)
    stream.seek(0)
    return read_array(stream, allow_pickle=False)

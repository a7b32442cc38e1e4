"""Errors in data that a user can fix."""

import contextlib
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from zipfile import BadZipFile

from PIL.Image import DecompressionBombError

from fastmum.errors import FastmumError
from fastmum.files import regular

# RuntimeError: of zip archives that are encrypted, or compressed in ways that `zipfile` does not know, and of OpenEXR.
OTHERS = (
    struct.error, zlib.error, BadZipFile, tarfile.TarError, DecompressionBombError, MemoryError, RuntimeError,
)  # fmt: skip


class DataError(FastmumError, ValueError):
    """Data that cannot be trained on; the message is one line for the user."""


@contextlib.contextmanager
def reading(file: Path, what: str, remedy: str = "restore or remove it") -> Iterator[None]:
    """Turn any error of reading a file into a `DataError` of one line that names the file; it must be `regular`."""
    try:
        regular(file)
        yield
    except FastmumError:
        raise
    except (OSError, ValueError, LookupError, TypeError, EOFError, SyntaxError, OverflowError, *OTHERS) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"'{file}' cannot be read as {what} ({reason}); {remedy}") from None

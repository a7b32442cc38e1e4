"""Errors in data that a user can fix."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

from PIL.Image import DecompressionBombError

from fastmum.errors import FastmumError
from fastmum.files import regular

OTHERS = (struct.error, DecompressionBombError, MemoryError, RecursionError)


class DataError(FastmumError, ValueError):
    """Data that cannot be trained on; the message is one line for the user."""


@contextlib.contextmanager
def reading(file: Path, what: str, remedy: str = "restore or remove it") -> Iterator[None]:
    """Turn any error of reading a file into a `DataError` of one line that names the file; it must be `regular`."""
    try:
        regular(file)
        yield
    except DataError:
        raise
    except (OSError, ValueError, LookupError, TypeError, EOFError, SyntaxError, OverflowError, *OTHERS) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"'{file}' cannot be read as {what} ({reason}); {remedy}") from None

"""Files that are hashed while they are written, and read again to be compared."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem

BLOCK = 1 << 24  # bytes read at once


class FileAbout(NamedTuple):
    """Size in bytes and XXH3-128 of a file."""

    size: int
    xxh3: str


class HashedFiles(FileSystem):
    """Files as `torch.distributed.checkpoint` writes them; `written` says what they must be."""

    def __init__(self) -> None:
        self.written: dict[str, FileAbout] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file to write."""
        with super().create_stream(path, mode) as file, _HashedStream(file) as stream:
            yield stream
        self.written[Path(path).name] = FileAbout(stream.size, stream.hash.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _HashedStream(io.IOBase):
    """Keeps an error of writing to itself until it is flushed: torch.save would make another one of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, xxhash.xxh3_128(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.hash.update(data)
        self.size += size
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return size

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        return self.file.fileno()

    def flush(self) -> None:
        if self.error:
            raise self.error
        if not self.file.closed:
            self.file.flush()

    def close(self) -> None:
        self.file.close()


def damage(path: Path, expected: FileAbout) -> str | None:
    """What is wrong with a file, None where it is whole."""
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{path.name} has {size} bytes instead of {expected.size}"
        seen = xxhash.xxh3_128()
        block = memoryview(bytearray(min(BLOCK, max(1, size))))
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(block):
                seen.update(block[:count])
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None if seen.hexdigest() == expected.xxh3 else f"{path.name} has other content than was written"


def sync_folder(path: Path) -> None:
    """Put the names in a folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

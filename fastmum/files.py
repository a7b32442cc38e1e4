"""Files that are replaced as a whole, files that may be opened, and files installed with the package."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import xxhash

import fastmum

PACKAGE = Path(__file__).resolve().parent
BLOCK, BLOCKS = 1 << 16, 64  # bytes and number of the parts of a large file that its digest covers


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path for a file or a folder, renamed to `path` on success and deleted on failure.

    Readers see the old file or the new one, never a part. The suffix stays, since writers choose a format by it. A
    folder replaces a file, or another folder, which is deleted just before.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield partial
        if partial.is_dir():
            _remove(path)
        os.replace(partial, path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace the content of a file; text is written as UTF-8, with escapes for names of files that are not."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def regular(path: Path) -> Path:
    """The path of a file that is about to be opened; OSError if it is a pipe, a socket or a device.

    Opening a named pipe waits until another process writes to it, and reading a device may never end.
    """
    with contextlib.suppress(FileNotFoundError):  # opening a missing file, or a folder, fails with a better message
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return path


def resource_dir(name: str) -> Path:
    """The folder `configs` or `launch`: inside the installed package, or next to it in a checkout."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def source_version() -> str:
    """The version of the package and a digest of its source, which differs between commits."""
    files = sorted([*PACKAGE.glob("**/*.py"), *resource_dir("kernels").glob("*.py")])
    return f"{fastmum.__version__} ({xxhash.xxh3_64_hexdigest(b''.join(file.read_bytes() for file in files))})"


def quick_digest(path: Path) -> str:
    """Digest of a file's size and of its bytes: all, or parts at equal distances in files of more than 4 MiB."""
    size = path.stat().st_size
    digest = xxhash.xxh3_64(str(size).encode())
    with open(path, "rb") as file:
        for offset in range(0, size, max(BLOCK, -(-size // BLOCKS))):
            file.seek(offset)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()

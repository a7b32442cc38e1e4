"""Files that are replaced as a whole, files of others that may be anything, and files installed with the package."""

import contextlib
import errno
import io
import itertools
import json
import os
import pickle
import pickletools
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

import fastmum

ABANDONED = ".abandoned"  # added to the names of files of steps that a resumed run does again
PACKAGE = Path(__file__).resolve().parent


def cache_folder() -> Path:
    """$FASTMUM_CACHE, else the user's cache folder; it may not exist."""
    from platformdirs import user_cache_dir

    return expand_user(os.environ.get("FASTMUM_CACHE") or user_cache_dir("fastmum"))


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
        _apply_umask(partial)
        if partial.is_dir():
            _remove(path)
        os.replace(partial, path)
    finally:
        _remove(partial)


def _apply_umask(path: Path) -> None:
    """Give files that only their owner may read, as safetensors writes them, the rights that the umask asks for."""
    files = path.rglob("*") if path.is_dir() else [path]
    private = [file for file in files if file.is_file() and not file.stat().st_mode & 0o077]
    if private:
        usual = path.with_name(f"{path.name}.mode")
        usual.touch()
        for file in private:
            file.chmod(stat.S_IMODE(usual.stat().st_mode))
        usual.unlink()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace the content of a file; text is written as UTF-8, with escapes for names of files that are not."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def expand_user(path: str | os.PathLike[str]) -> Path:
    """The path with the home folder in place of ~; a name after ~ that is no user stays as it is."""
    return Path(os.path.expanduser(path))


def free_path(path: Path, suffix: str = "") -> Path:
    """The path and the suffix, with a number between them if that exists."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (path.with_name(f"{path.name}{number}{suffix}") for number in numbers)
    return next(free for free in paths if not free.exists())


def regular(path: Path) -> Path:
    """The path of a file that is about to be opened; OSError if it is a pipe, a socket or a device.

    Opening a named pipe waits until another process writes to it, and reading a device may never end.
    """
    # Opening a missing file, or a folder, fails with a better message.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return path


def read_json(path: Path, limit: int = 1 << 28) -> Any:
    """The content of a JSON file. OSError: not `regular`, or larger than `limit` bytes. ValueError: not JSON."""
    if regular(path).stat().st_size > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), os.fspath(path))
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def unpickle(stream: IO[bytes] | io.IOBase, allowed: Mapping[str, Any]) -> Any:
    """Read a pickle that may use nothing but `allowed`, full names -> objects; pickle.UnpicklingError otherwise.

    ValueError: it is cut off, or numbers its objects so that a few bytes would take all memory.
    """
    data = stream.read()
    for opcode, number, _ in pickletools.genops(data):
        if opcode.name.endswith("PUT") and int(number or 0) > len(data):  # it allocates that many places
            raise ValueError("an object has a number that is larger than the file")

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" not in allowed:
                raise pickle.UnpicklingError(f"uses {module}.{name}, which is not loaded, because it can run code")
            return allowed[f"{module}.{name}"]

    return Unpickler(io.BytesIO(data)).load()


def resource_dir(name: str) -> Path:
    """The folder `configs` or `launch`: inside the installed package, or next to it in a checkout."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def source_version() -> str:
    """The version of the package and a digest of its source, which differs between commits."""
    files = sorted([*PACKAGE.glob("**/*.py"), *resource_dir("kernels").glob("*.py")])
    return f"{fastmum.__version__} ({xxhash.xxh3_64_hexdigest(b''.join(file.read_bytes() for file in files))})"

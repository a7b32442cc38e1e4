"""Where the bytes of files are: loose files, members of tar and zip archives, objects of stores such as S3.

A `StoredPath` is the path of a file as if its archive were unpacked. It reads like any other `Path`, from its `Place`,
by one `pread` or range request. Every read is verified, so that no other bytes are taken for the file: of a member of
a tar archive by the CRC-32 of the header block in front of it, of a member of a zip archive by that of its content.
"""

import errno
import io
import os
import resource
import stat
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import IO, Any, NamedTuple

from fastmum.data import remote
from fastmum.data.remote import WHOLE, is_url
from fastmum.files import regular

BLOCK = 512  # bytes of a tar header, and what members of tars are aligned to
# Open archives, at most half of the files that the process may open (-1: any number).
MOST_HANDLES = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] % (1 << 63) // 2)
# Set by `fastmum.data.staging`: return content that was read ahead of time, or was copied to the stage, else None.
ahead: "Callable[[Place], bytes | None] | None" = None
stage: "Callable[[Place], bytes | None] | None" = None


class Place(NamedTuple):
    """Where the bytes of a file are; the `length` bytes from `offset` of a file or an object."""

    store: str  # path or URL of the archive, or of the file itself
    offset: int = 0
    length: int = WHOLE  # bytes in the store
    check: int = 0  # CRC-32 of the tar header in front of a member, or of the content of a member of a zip
    deflated: bool = False
    size: int = -1  # of the content, -1 where it is unknown

    @property
    def in_tar(self) -> bool:
        """Whether it is a member of a tar archive."""
        return self.length != WHOLE and not self.store.lower().endswith(".zip")


def join(root: str | Path, path: str) -> str:
    """Path or URL below a root."""
    if not is_url(root):
        return os.path.normpath(os.path.join(root, path))
    scheme, colon, rest = f"{str(root).rstrip('/')}/{path}".partition("://")
    relative = {".", ".."}.intersection(rest.split("/"))  # otherwise a name may have empty parts
    return scheme + colon + (os.path.normpath(rest) if relative else rest)


class StoredPath(PosixPath):
    """The path of a file in an archive, a store or a stage; without a place, a folder of a store."""

    place: Place | None = None
    side: Path | None = None  # a file that belongs to this one, see `fastmum.data.depth.SIDES`

    @classmethod
    def at(cls, path: str, place: Place | None, side: Path | None = None) -> "StoredPath":
        """A path with a place."""
        made = cls(path)
        made.place, made.side = place, side
        return made

    def __reduce__(self) -> Any:
        return StoredPath.at, (str(self), self.place, self.side)

    def __str__(self) -> str:
        text = super().__str__()  # in which the slashes of a URL are one
        scheme, colon, rest = text.partition(":/")
        return f"{scheme}://{rest}" if colon and scheme and "/" not in scheme else text

    def read_bytes(self) -> bytes:
        """The verified content; OSError if it cannot be read."""
        if self.place is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return read(self.place)

    def open(self, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> IO[Any]:  # type: ignore[override]
        """A stream of the content, for reading."""
        stream = io.BytesIO(self.read_bytes())
        return stream if "b" in mode else io.TextIOWrapper(stream, *args, **options)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Type and size; the time is 0."""
        if self.place is None or (not is_url(self.place.store) and not os.path.exists(self.place.store)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return stat_of(stat.S_IFREG, max(0, self.place.size))

    def exists(self, **options: Any) -> bool:
        """Whether there is a file or folder."""
        return self._is(lambda mode: True)

    def is_file(self, **options: Any) -> bool:
        """Whether it is a file."""
        return self._is(stat.S_ISREG)

    def is_dir(self, **options: Any) -> bool:
        """Whether it is a folder."""
        return self._is(stat.S_ISDIR)

    def _is(self, kind: Any) -> bool:
        try:
            return bool(kind(self.stat().st_mode))
        except OSError:
            return False


def place_of(file: Path) -> Place:
    """The place of a file: its own one, or all of a real file or an object."""
    return getattr(file, "place", None) or Place(str(file))


def stat_of(kind: int, size: int) -> os.stat_result:
    """The result of `os.stat` for a read-only file or folder of a size."""
    return os.stat_result((kind | 0o555, 0, 0, 1, 0, 0, size, 0, 0, 0))


def source(file: Path) -> Path | IO[bytes]:
    """What a library can open: the path of a real file, else a stream of the content."""
    real = not isinstance(file, StoredPath) or (file.place is None and os.path.exists(file))
    return Path(str(file)) if real else file.open("rb")


def read(place: Place) -> bytes:
    """The verified content of a file; OSError if it cannot be read, or other bytes are in its place."""
    for nearer in (ahead, stage):
        if nearer is not None and (content := nearer(place)) is not None:
            return content
    return fetch(place)


def fetch(place: Place) -> bytes:
    """`read` from the store itself."""
    before = BLOCK if place.in_tar else 0
    start, length = place.offset - before, WHOLE if place.length == WHOLE else place.length + before
    data = (remote.read if is_url(place.store) else _pread)(place.store, start, length)
    return _verified(place, data, before)


def _verified(place: Place, data: bytes, before: int) -> bytes:
    if place.length == WHOLE:
        return data
    if len(data) < place.length + before:
        raise _bad(place, "is cut off")
    if len(data) > place.length + before:
        raise OSError(errno.EOPNOTSUPP, f"'{place.store}' lies on a server that sends more than the range asked for")
    header, content = data[:before], data[before:] if before else data
    if place.in_tar:
        right = zlib.crc32(header) == place.check
    else:
        try:
            content = zlib.decompress(content, -zlib.MAX_WBITS) if place.deflated else content
        except zlib.error:
            raise _bad(place, "holds other bytes") from None
        right = zlib.crc32(content) == place.check
    if not right:
        raise _bad(place, "holds another file")
    return content


def _bad(place: Place, what: str) -> OSError:
    text = f"'{place.store}' {what} at byte {place.offset}; restore the archive, or build or pack again"
    return OSError(errno.EBADMSG, text)


class Handle:
    """An open file, closed once nothing refers to it: another thread may still read when it leaves the cache."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_handles: OrderedDict[str, Handle] = OrderedDict()
_lock = threading.Lock()


def _pread(path: str, start: int, length: int) -> bytes:
    if length == WHOLE:
        return regular(Path(path)).read_bytes()
    with _lock:
        handle = _handles.get(path)
        if handle is not None:
            _handles.move_to_end(path)
    if handle is None:
        handle = Handle(path)
        with _lock:
            _handles[path] = handle
            while len(_handles) > MOST_HANDLES:
                _handles.popitem(last=False)
    try:
        data = os.pread(handle.number, length, start)
        while len(data) < length and (more := os.pread(handle.number, length - len(data), start + len(data))):
            data += more
        return data
    except OSError:  # a stale handle of a network file system
        with _lock:
            _handles.pop(path, None)
        raise

"""Objects of fsspec stores (`s3://`, `gs://`, `hf://`, `https://` ...): range requests that are retried."""

import contextlib
import errno
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from fastmum.data.errors import DataError
from fastmum.errors import writing
from fastmum.files import cache_folder, write_atomic

log = logging.getLogger(__name__)

T = TypeVar("T")

WHOLE = -1  # length of all bytes of a file or object
RETRY_S = 300.0  # seconds that a store may fail
START_S = 20.0  # at the start of a run, which would otherwise wait for a wrong address
FIRST_S, LONGEST_S = 0.25, 8.0  # between attempts
# Errors that no attempt changes, by the name of their class: fsspec's stores have no common one.
FINAL = (
    "FileNotFound", "Permission", "NoCredentials", "CredentialRetrieval", "ProfileNotFound", "ImportError",
    "IsADirectory",
)  # fmt: skip
# Of a range that begins at the end of an object or after it: status 416, in the words of servers and packages.
BEYOND = re.compile(r"not satisfiable|InvalidRange|\(416\)", re.IGNORECASE)
# Schemes whose stores have folders. Elsewhere, making one may make a bucket.
WITH_FOLDERS = ("file", "local", "memory", "sftp", "ssh", "smb", "ftp", "hdfs", "webhdfs")
_outage = threading.Event()


def is_url(text: str | Path) -> bool:
    """Whether a place is an object of a store."""
    return "://" in str(text)


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it; DataError if its package is not installed.

    Endpoints and credentials are fsspec's: of the environment (`AWS_...`, `FSSPEC_S3_ENDPOINT_URL`), or its files.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"'{url}' cannot be read: {error}; pip install 'fastmum[remote]'") from None


def read(url: str, start: int = 0, length: int = WHOLE, retry_s: float | None = None) -> bytes:
    """Bytes of an object. Failing requests are sent again for `RETRY_S` seconds; then, or if that is useless, OSError.

    The error is a FileNotFoundError or PermissionError where that is the reason. A range beyond the end gives fewer
    bytes or none, as of files.
    """
    system, path = file_system(url)
    part = {} if length == WHOLE else {"start": start, "end": start + length}

    def request() -> bytes:
        try:
            return system.cat_file(path, **part)
        except Exception as error:
            if part and BEYOND.search(f"{error} {error.__cause__}"):
                return b""
            raise

    return _retried(url, request, retry_s)


def _retried(url: str, request: Callable[[], T], retry_s: float | None = None) -> T:
    """The result of a request; errors as of `read`."""
    retry_s = RETRY_S if retry_s is None else retry_s
    end, wait = time.monotonic() + retry_s, FIRST_S
    while True:
        try:
            found = request()
            _outage.clear()
            return found
        except Exception as error:
            reason, final = _explained(error)
            if final:
                missing = isinstance(error, FileNotFoundError)
                kind = FileNotFoundError if missing else PermissionError
                raise kind(errno.ENODATA if missing else errno.EACCES, reason, url) from None
            if time.monotonic() + wait > end:
                raise TimeoutError(errno.ETIMEDOUT, reason, url) from None
            if not _outage.is_set():
                _outage.set()
                log.warning("'%s' cannot be read for now (%s); it is tried again for %.0f s", url, reason, retry_s)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_S)


def _explained(error: Exception) -> tuple[str, bool]:
    """The reason of an error, and whether it is one of `FINAL`."""
    final = any(kind.__name__.startswith(FINAL) for kind in type(error).__mro__)
    return f"{type(error).__name__}: {' '.join(str(error).split())}", final


def size(url: str) -> int:
    """Bytes of an object, 0 if its store does not tell; errors as of `read`."""
    system, path = file_system(url)
    return int(_retried(url, lambda: system.info(path))["size"] or 0)


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    """Turn an OSError into a DataError of one line."""
    try:
        yield
    except OSError as error:
        remedy = "check its name and the store's credentials"
        raise DataError(f"'{url}' cannot be read ({error.strerror}); {remedy}") from None


def check(url: str) -> None:
    """DataError in one line if an object cannot be read: no package, no credentials, no such bucket or object."""
    with _reading(url):
        read(url, 0, 1, START_S)


def exists(url: str) -> bool:
    """Whether there is an object; DataError in one line if its store does not tell."""
    with _reading(url):
        try:
            size(url)
        except FileNotFoundError:
            return False
    return True


def local_copy(url: str | Path) -> Path:
    """The content of an object in a file of the cache, of its present version; DataError if it cannot be read."""
    url = str(url)
    check(url)
    system, path = file_system(url)
    with _reading(url):
        # fsspec's key of a version; over HTTP that would be the URL alone.
        content = read(url) if url.startswith("http") else None
        version = _retried(url, lambda: system.ukey(path)) if content is None else xxhash.xxh3_64_hexdigest(content)
        name = xxhash.xxh3_64_hexdigest(f"{url} {version}".encode())
        copy = cache_folder() / "objects" / f"{name}-{path.rpartition('/')[2]}"
        if copy.is_file():
            return copy
        content = read(url) if content is None else content
    with writing(copy, DataError):
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(copy, content)
    return copy


def write(url: str, content: Path | bytes) -> None:
    """Upload a file or bytes, which replace the object; DataError if that fails, such as for a missing bucket."""
    system, path = file_system(url)
    for wait in (FIRST_S, 1.0, LONGEST_S, None):
        try:
            if url.partition("://")[0] in WITH_FOLDERS:
                system.makedirs(path.rpartition("/")[0], exist_ok=True)
            if isinstance(content, bytes):
                system.pipe_file(path, content)
            else:
                system.put_file(str(content), path)
            return
        except Exception as error:
            reason, final = _explained(error)
            if wait is None or final:
                raise DataError(f"'{url}' cannot be written ({reason})") from None
        time.sleep(wait)


def check_writable(folder: str) -> None:
    """DataError in one line if no object can be written below a URL, which is tried."""
    write(probe := f"{folder.rstrip('/')}/.fastmum-probe", b"probe")
    system, path = file_system(probe)
    with contextlib.suppress(Exception):  # who may write may not delete
        system.rm_file(path)

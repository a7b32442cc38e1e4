"""Files that are read before decoders ask for them: remote ones into memory, all of them into a folder on a local disk.

Both happen in daemon threads, and both are optional: what is not there yet is read from its store.
"""

import contextlib
import errno
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from fastmum.data import store
from fastmum.data.errors import DataError
from fastmum.data.store import WHOLE, Place, StoredPath, is_url
from fastmum.errors import writing
from fastmum.files import expand_user

log = logging.getLogger(__name__)

T = TypeVar("T")

THREADS = 16  # that read; a request to a store takes tens of milliseconds
STEPS_AHEAD = 32  # plans whose files are copied before the first of them is read
COUNTED = 64 << 20  # bytes that a process writes between two looks at the size of the folder
KEPT = 0.8  # of the allowed size after the oldest copies were deleted
DIGEST = 8  # bytes of a checksum at the start of each copy


class _Threads:
    """Daemon threads that compute futures. Not an executor, which would wait for requests when Python exits."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        for i in range(THREADS):
            threading.Thread(target=self._work, name=f"read_{i}", daemon=True).start()

    def submit(self, job: Callable[[], T]) -> "Future[T]":
        """The future of a job."""
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def _work(self) -> None:
        while True:
            future, job = self._jobs.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)
            del future, job  # or their bytes would stay in memory


_threads: _Threads | None = None
_lock = threading.Lock()
_ahead: dict[Place, "Future[bytes]"] = {}
_stage: "Stage | None" = None


def _submit(job: Callable[[], T]) -> "Future[T]":
    global _threads
    with _lock:
        _threads = _threads or _Threads()
    return _threads.submit(job)


def _places(files: Iterable[Path]) -> list[Place]:
    """The different places of files."""
    return [*dict.fromkeys(file.place for file in files if isinstance(file, StoredPath) and file.place)]


def _taken(place: Place) -> bytes | None:
    future = _ahead.pop(place, None)
    return None if future is None else future.result()


@contextlib.contextmanager
def reading_ahead(files: Iterable[Path]) -> Iterator[None]:
    """Read the remote ones of some files concurrently, while decoders in the context take one after another."""
    store.ahead = _taken
    new = [place for place in _places(files) if is_url(place.store) and place not in _ahead]
    mine = {place: _submit(partial(_nearest, place)) for place in new}
    _ahead.update(mine)
    try:
        yield
    finally:
        for place, future in mine.items():
            if _ahead.get(place) is future:
                _ahead.pop(place, None)
                future.cancel()


def _nearest(place: Place) -> bytes:
    staged = _stage.read(place) if _stage else None
    return store.fetch(place) if staged is None else staged


def start(folder: str | None, gigabytes: float) -> None:
    """Copy files to a folder from now on, `data.stage`; None: no longer. DataError: it cannot be written."""
    global _stage
    _stage = Stage(expand_user(folder), int(gigabytes * 1e9)) if folder else None
    store.stage = _stage.read if _stage else None


def copied_ahead(plans: Iterable[T], files: Callable[[T], Iterable[Path]]) -> Iterator[T]:
    """The plans, with the files of the next `STEPS_AHEAD` of them being copied to the stage, if there is one."""
    waiting: deque[tuple[T, list[Future[None]]]] = deque()

    def pop() -> T:
        plan, copying = waiting.popleft()
        for copy in copying:
            copy.cancel()  # if it has not begun, the frame is read from its store
        return plan

    for plan in plans:
        if (stage := _stage) is None:
            yield from (pop() for _ in range(len(waiting)))
            yield plan
            continue
        waiting.append((plan, [_submit(partial(stage.copy, place)) for place in _places(files(plan))]))
        if len(waiting) > STEPS_AHEAD:
            yield pop()
    while waiting:
        yield pop()


class Stage:
    """Copies of files in a folder, shared by the processes of a machine, the oldest deleted beyond `most` bytes.

    A copy appears whole, under a name that depends on its place, and starts with its checksum. A copy that is damaged
    or was deleted is read from its store again. What a killed process left is deleted at the next start.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder / "fastmum-stage", most
        self._written = COUNTED  # so that the first copy looks at the size
        self._full = False
        with writing(self.folder, DataError):
            self.folder.mkdir(parents=True, exist_ok=True)
            (probe := self.folder / f".partial-{os.getpid()}").touch()
            probe.unlink()
        for left in self.folder.glob(".partial-*"):
            with contextlib.suppress(OSError, ValueError):
                number = int(left.name.split("-")[1])
                if not Path("/proc", str(number)).exists():
                    left.unlink()

    def _file(self, place: Place) -> Path:
        key = repr(place[:5])
        if place.length == WHOLE and not is_url(place.store):  # a loose file may be replaced
            found = os.stat(place.store)
            key += f" {found.st_size} {found.st_mtime_ns}"
        name = xxhash.xxh3_128_hexdigest(key.encode())
        return self.folder / name[:2] / name[2:]

    def read(self, place: Place) -> bytes | None:
        """The copied content; None if there is none, or it is damaged."""
        try:
            data = self._file(place).read_bytes()
        except OSError:
            return None
        content = data[DIGEST:]
        return content if xxhash.xxh3_64_digest(content) == data[:DIGEST] else None

    def copy(self, place: Place) -> None:
        """Copy a file, unless it is there; errors of reading are left to decoders."""
        try:
            file = self._file(place)
            if file.exists():
                return
            content = store.fetch(place)
        except OSError:
            return
        partial = self.folder / f".partial-{os.getpid()}-{threading.get_ident()}"
        try:
            self._make_room(len(content))
            file.parent.mkdir(exist_ok=True)
            partial.write_bytes(xxhash.xxh3_64_digest(content) + content)
            os.replace(partial, file)
            self._full = False
        except OSError as error:
            partial.unlink(missing_ok=True)
            self._delete_oldest()
            if not self._full:
                reason = os.strerror(error.errno or errno.EIO)
                log.warning("data.stage: '%s' cannot be written (%s); files are read from their stores", file, reason)
            self._full = True

    def _make_room(self, bytes: int) -> None:
        self._written += bytes
        if self._written >= min(COUNTED, self.most // 16):
            self._written = 0
            self._delete_oldest(self.most)

    def _delete_oldest(self, most: int | None = None) -> None:
        """Delete the oldest copies until the rest takes a share of `most`, or of what is there."""
        found = []
        for folder in self.folder.iterdir():
            with contextlib.suppress(OSError):
                stats = [(entry.stat(), entry.path) for entry in os.scandir(folder)]
                found += [(stat.st_mtime_ns, stat.st_size, path) for stat, path in stats]
        total = sum(size for _, size, _ in found)
        if most is not None and total <= most:
            return
        for _, size, path in sorted(found):
            if total <= KEPT * (total if most is None else most):
                return
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size

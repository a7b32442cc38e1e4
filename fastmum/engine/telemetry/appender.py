"""A file that only grows by whole records, and survives a full disk."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from pathlib import Path

log = logging.getLogger(__name__)


class Appender:
    """Appends records to a file; those that cannot be written wait in memory until they can.

    A record is in the file whole or not at all: what a full disk has left of one is cut off. The first failure of a row
    is a warning.

    Args:
        path: of the file; it and its folder are made when they are needed.
        end: bytes of the file to keep; what lies behind them is dropped at once.
    """

    def __init__(self, path: Path, end: int = 0) -> None:
        self._path, self._end = path, end
        self._file: int | None = None
        self._waiting: deque[bytes] = deque()
        self._no_room_for = 0  # bytes; 0: nothing fails
        if path.exists():
            self._write_waiting()

    def append(self, record: bytes, keep: bool = True) -> None:
        """Append a record after those that wait.

        Args:
            record: a whole one.
            keep: whether it waits in memory when it cannot be written now.
        """
        self._waiting.append(record)
        self._write_waiting()
        if self._waiting and not keep:
            self._waiting.pop()

    def close(self) -> None:
        """Try once more to write what waits, and close the file."""
        self._write_waiting()
        if self._waiting:
            log.warning("%s: %d records could not be written and are lost", self._path, len(self._waiting))
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None

    def _write_waiting(self) -> None:
        records, size = len(self._waiting), sum(map(len, self._waiting))
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._cut()
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._no_room_for:
                log.warning("%s cannot be written (%s); training goes on", self._path, error.strerror)
            self._no_room_for = max(1, sum(map(len, self._waiting)))
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._cut()
        else:
            # That a small record fits where a large one did not is no news.
            if 0 < self._no_room_for <= size:
                log.info("%s can be written again; %d records caught up", self._path, records)
                self._no_room_for = 0

    def _cut(self) -> None:
        """Drop what lies behind the last whole record: a part of one, or what a resumed run does not keep."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        if size > self._end:
            os.ftruncate(self._file, self._end)
        self._end = min(self._end, size)  # a file that somebody has cut meanwhile has no hole in it

    def _write(self, record: bytes) -> None:
        assert self._file is not None
        written = 0
        while written < len(record):  # a disk that fills up takes a part
            written += os.pwrite(self._file, record[written:], self._end + written)
        self._end += written

"""Frames that cannot be decoded: their replacements, their number, and the limit that stops a run."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests

log = logging.getLogger(__name__)

MAX_SHARE = 0.05  # of a data set's frames
MIN_FRAMES = 20  # frames of a data set that must have been read before it can stop a run
STANDARD_ERRORS = 3.0  # by which the share must exceed MAX_SHARE while the data set has unread frames
MAX_SEQUENCES = 4  # searched for a replacement: the frame's own sequence and the next three
NAMED = 3  # files named in messages


class Faults:
    """Counts bad frames, proposes replacements, and stops a run that has too many bad frames. Thread-safe.

    A data set stops the run when more than 5 % of its frames are bad. While frames are unread, the share among the read
    ones must exceed 5 % by three standard errors. Fewer than 20 read frames never stop a run.

    Args:
        manifests: the rows of frames index these.
        log_file: gets one line per bad frame: data set, file, reason. Lines of an earlier start of the run, or of other
            processes, are counted and not repeated.
        held_out: (sequences,) bool; held-out and training sequences never replace each other. None: nothing is held
            out.

    Raises:
        DataError: the log cannot be read.
    """

    def __init__(self, manifests: Manifests, log_file: Path | None = None, held_out: np.ndarray | None = None) -> None:
        self.manifests = manifests
        self.held_out = np.zeros(manifests.num_sequences, bool) if held_out is None else held_out
        sets = len(manifests.datasets)
        self._log = _LogFile(log_file) if log_file is not None else None
        self._lock = threading.Lock()
        self._bad: set[int] = set()
        self._first: dict[int, list[Path]] = {}
        # Frames by data set: all, and those that this process has read and found bad.
        self._total = np.bincount(manifests.dataset_of, np.diff(manifests.starts), minlength=sets)
        self._read = np.zeros(sets, np.int64)
        self._found = np.zeros(sets, np.int64)
        self._was_read = np.zeros(manifests.num_frames, bool)  # untouched pages take no memory

    @property
    def counts(self) -> dict[str, int]:
        """Bad frames by data set, without zeros: of all processes that share the log, or of this one without a log."""
        with self._lock:
            names = self.manifests.datasets
            if self._log is None:
                return {name: int(found) for name, found in zip(names, self._found, strict=True) if found}
            self._log.update()
            listed = Counter(dataset for dataset, _ in self._log.listed)
            return {name: listed[name] for name in names if listed[name]}

    def read(self, rows: np.ndarray) -> None:
        """Record an attempt to decode these frames; those not passed to `add` were good."""
        with self._lock:
            new = np.unique(rows[~self._was_read[rows]])
            self._was_read[new] = True
            datasets = self.manifests.dataset_of[self.manifests.sequence_of(new)]
            self._read += np.bincount(datasets, minlength=len(self._read))

    def add(self, row: int, file: Path, reason: str) -> None:
        """Record a bad frame, which must have been passed to `read`.

        Raises:
            DataError: the log cannot be written.
        """
        with self._lock:
            if row in self._bad:
                return
            self._bad.add(row)
            number = int(self.manifests.dataset_of[self.manifests.sequence_of(row)])
            self._found[number] += 1
            first = self._first.setdefault(number, [])
            if len(first) < NAMED:
                first.append(file)
                log.warning("'%s' cannot be decoded and is replaced by another frame: %s", file, reason)
            if self._log:
                self._log.write(self.manifests.datasets[number], file, reason)

    def check(self) -> None:
        """Stop the run if a data set has too many bad frames; call it after `read` and `add` of a batch.

        A batch of good frames can stop a run too: fewer unread frames mean a smaller standard error.

        Raises:
            DataError: too many bad frames.
        """
        with self._lock:
            for number, files in self._first.items():
                bad, read, total = self._found[number], self._read[number], self._total[number]
                error = np.sqrt(MAX_SHARE * (1 - MAX_SHARE) * read * (1 - read / total))
                if read < MIN_FRAMES or bad <= MAX_SHARE * read + STANDARD_ERRORS * error:
                    continue
                named = ", ".join(f"'{file}'" for file in files)
                listed = f"; all are listed in '{self._log.path}'" if self._log else ""
                raise DataError(
                    f"{bad} of {read} frames of the data set '{self.manifests.datasets[number]}' cannot be decoded, "
                    f"such as {named}{listed}; restore them, or leave the data set out"
                )

    def replacements(self, row: int, taken: set[int]) -> Iterator[int]:
        """Rows that may replace a bad one, in an order that depends only on the arguments and the known bad frames.

        First the other frames of its sequence, from `row` on, those not in `taken` first. Then the next sequences of
        its data set with the same `held_out` flag, which is where single images find theirs. Known bad frames are
        skipped.
        """
        manifests = self.manifests
        own = int(manifests.sequence_of(row))
        alike = (manifests.dataset_of == manifests.dataset_of[own]) & (self.held_out == self.held_out[own])
        sequences = np.flatnonzero(alike)
        place = int(np.searchsorted(sequences, own))
        for sequence in np.roll(sequences, -place)[:MAX_SEQUENCES].tolist():
            first, last = manifests.starts[sequence : sequence + 2].tolist()
            rows = [first + (row - first + i) % (last - first) for i in range(last - first)]
            for candidate in sorted(rows, key=taken.__contains__):
                if candidate != row and candidate not in self._bad:
                    yield candidate


class _LogFile:
    """Tab-separated bad frames, appended by several processes; lists each file of a data set once.

    Attributes:
        listed: data set and file of every line read or written so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listed: set[tuple[str, str]] = set()
        self._offset = 0
        self.update()

    def update(self) -> None:
        """Read the lines that other processes appended.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            if self.path.is_file() and self.path.stat().st_size > self._offset:
                with self._open("r") as file:
                    self._read(file)
        except OSError as error:
            raise DataError(f"'{self.path}' cannot be read ({error.strerror or error})") from None

    def write(self, dataset: str, file: Path, reason: str) -> None:
        """Append a line, unless the file is listed.

        Raises:
            DataError: the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._open("a+") as out:
                self._read(out)
                if (dataset, str(file)) not in self.listed:
                    self.listed.add((dataset, str(file)))
                    out.write(f"{dataset}\t{file}\t{' '.join(reason.split())}\n")
                self._offset = out.tell()
        except OSError as error:
            raise DataError(f"'{self.path}' cannot be written ({error.strerror or error})") from None

    def _open(self, mode: str) -> IO[str]:
        return open(self.path, mode, encoding="utf-8", errors="surrogateescape")  # file names may be any bytes

    def _read(self, file: IO[str]) -> None:
        file.seek(self._offset)
        while line := file.readline():  # iteration would disable tell()
            if line.count("\t") >= 2:
                dataset, name, _ = line.split("\t", 2)
                self.listed.add((dataset, name))
        self._offset = file.tell()

"""Frames that cannot be decoded: what takes their place, how many there are, and when there are too many."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests

log = logging.getLogger(__name__)

MAX_SHARE = 0.05  # of a data set's frames
MIN_FRAMES = 20  # of a data set that must have been read before it can stop a run
STANDARD_ERRORS = 3.0  # by which the share must be above MAX_SHARE while part of the data set has not been read
MAX_SEQUENCES = 4  # to look for a replacement in: the frame's own and those behind it
NAMED = 3  # files named in messages
ENCODING = {"encoding": "utf-8", "errors": "surrogateescape"}  # of the log: names of files may be any bytes


class Faults:
    """Counts bad frames and stops a run that has too many; may be used by several threads.

    A data set stops the run when more than 5 % of its frames are bad: exactly so once all were read, and before that
    when the share among those read is above 5 % by three standard errors. Fewer than 20 frames never do.

    Args:
        manifests: the frames are rows of.
        log_file: gets a line for each bad frame: data set, file, reason. Those that it lists already, from before a run
            was resumed, are counted and not repeated.
        held_out: (sequences,) bool; what is held out and what is not never replace each other. None: nothing is.

    Raises:
        DataError: the log cannot be read.
    """

    def __init__(self, manifests: Manifests, log_file: Path | None = None, held_out: np.ndarray | None = None) -> None:
        self.manifests = manifests
        self.held_out = np.zeros(manifests.num_sequences, bool) if held_out is None else held_out
        sets = len(manifests.datasets)
        self._log = _LogFile(log_file) if log_file is not None else None
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._bad: set[int] = set()
        self._found = np.zeros(sets, np.int64)  # by this process, as `_read` is: their quotient is the share
        self._first: dict[int, list[Path]] = {}
        self._total = np.bincount(manifests.dataset_of, np.diff(manifests.starts), minlength=sets)
        self._read = np.zeros(sets, np.int64)
        self._was_read = np.zeros(manifests.num_frames, bool)  # pages that are not touched take no memory

    @property
    def counts(self) -> dict[str, int]:
        """Bad frames by data set, only those that have any: of all processes that share the log, or of this one."""
        with self._lock:
            if self._log:
                self._log.catch_up()
                listed = Counter(dataset for dataset, _ in self._log.listed)
            else:
                listed = self._counts
            return {name: listed[name] for name in self.manifests.datasets if listed[name]}

    @property
    def total(self) -> int:
        """Bad frames of all data sets."""
        return sum(self.counts.values())

    def read(self, rows: np.ndarray) -> None:
        """Note that an attempt was made to decode these frames, and that those not given to `add` were good."""
        with self._lock:
            new = np.unique(rows[~self._was_read[rows]])
            self._was_read[new] = True
            datasets = self.manifests.dataset_of[self.manifests.sequence_of(new)]
            self._read += np.bincount(datasets, minlength=len(self._read))

    def add(self, row: int, file: Path, reason: str) -> None:
        """Note a bad frame, which must have been given to `read`.

        Raises:
            DataError: the log cannot be written.
        """
        with self._lock:
            if row in self._bad:
                return
            self._bad.add(row)
            number = int(self.manifests.dataset_of[self.manifests.sequence_of(row)])
            name = self.manifests.datasets[number]
            self._found[number] += 1
            self._counts[name] += 1
            first = self._first.setdefault(number, [])
            if len(first) < NAMED:
                first.append(file)
                log.warning("'%s' cannot be decoded and is replaced by another frame: %s", file, reason)
            if self._log:
                self._log.write(name, file, reason)

    def check(self) -> None:
        """To be called once the bad ones among the frames given to `read` were given to `add`.

        Good frames can stop a run too: they take away the doubt about the share among those not yet read.

        Raises:
            DataError: too many frames of a data set are bad.
        """
        with self._lock:
            for number in self._first:
                self._check(number)

    def replacements(self, row: int, taken: set[int]) -> Iterator[int]:
        """Rows that may take the place of a bad one, in an order that depends on the arguments alone.

        First the other frames of its sequence from there on, those not in `taken` before those that are; then the
        sequences that follow in its data set and are held out as it is, where single images find theirs. Known bad
        frames are passed over.
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

    def _check(self, number: int) -> None:
        bad, read, total = self._found[number], self._read[number], self._total[number]
        unread = 1 - read / total
        error = np.sqrt(MAX_SHARE * (1 - MAX_SHARE) * read * unread)
        if read < MIN_FRAMES or bad <= MAX_SHARE * read + STANDARD_ERRORS * error:
            return
        name = self.manifests.datasets[number]
        files = ", ".join(f"'{file}'" for file in self._first[number])
        listed = f"; all are listed in '{self._log.path}'" if self._log else ""
        raise DataError(
            f"{bad} of {read} frames of the data set '{name}' cannot be decoded, such as {files}{listed}; "
            f"restore them, or leave the data set out"
        )


class _LogFile:
    """A file of bad frames that names each once for a data set, whichever process found it.

    Attributes:
        listed: data set and file of every line that was seen.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listed: set[tuple[str, str]] = set()
        self._read_until = 0
        if path.is_file():
            self._take_in()

    def catch_up(self) -> None:
        """Take in what other processes wrote.

        Raises:
            DataError: the file cannot be read.
        """
        if self.path.is_file() and self.path.stat().st_size > self._read_until:
            self._take_in()

    def _take_in(self) -> None:
        try:
            with open(self.path, **ENCODING) as lines:
                lines.seek(self._read_until)
                self._read(lines)
        except OSError as error:
            raise DataError(f"'{self.path}' cannot be read ({error.strerror or error})") from None

    def write(self, dataset: str, file: Path, reason: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+", **ENCODING) as out:
                out.seek(self._read_until)
                self._read(out)  # what other processes wrote
                if (dataset, str(file)) not in self.listed:
                    self.listed.add((dataset, str(file)))
                    out.write(f"{dataset}\t{file}\t{' '.join(reason.split())}\n")
                self._read_until = out.tell()
        except OSError as error:
            raise DataError(f"'{self.path}' cannot be written ({error.strerror or error})") from None

    def _read(self, lines: TextIO) -> None:
        """Take in the lines from there on."""
        while line := lines.readline():  # iterating would make tell() an error
            if line.count("\t") >= 2:
                dataset, file, _ = line.split("\t", 2)
                self.listed.add((dataset, file))
        self._read_until = lines.tell()

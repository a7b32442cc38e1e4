"""Bad frames of a run: counted, listed in a file, replaced; a data set with too many stops the run."""

import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests

log = logging.getLogger(__name__)

MAX_SHARE = 0.05  # of bad frames in the sequences of a data set, on average
MIN_SEQUENCES, MIN_FRAMES = 100, 1000  # of a data set that must have been read before it can stop a run
SMALL_SEQUENCES, SMALL_FRAMES = 0.75, 0.5  # shares of a data set that are enough where these are fewer
STANDARD_ERRORS = 0.5  # by which the share must exceed MAX_SHARE while the data set has unread frames
MAX_TRIES = 1000  # frames that are tried in place of a bad one, at most half of them from its own sequence
NAMED = 3  # files named in messages
# States of a frame. The last one was not read for a batch, but was tried as a replacement and is bad.
UNREAD, GOOD, BAD, NO_REPLACEMENT = range(4)


class Faults:
    """Counts bad frames, proposes replacements, and stops a run that has too many bad frames. Thread-safe.

    Frames go missing with their whole sequence, so sequences are counted: each with its share of bad frames among those
    that were read. Their mean must not exceed 5 % by half a standard error, or at all once every frame was read. Before
    100 sequences and 1,000 frames of a data set were read (small ones: most), nothing is decided. Frames that are tried
    as replacements do not count. The counts of several processes are added up (`tally`, `pool`).

    Args:
        log_file: gets one line per bad frame: data set, file, reason. Lines of an earlier start of the run, or of other
            processes, are counted and not repeated.
        held_out: (sequences,) bool; held-out and training sequences never replace each other. None: all are training.
        processes: of the run; with more than one, `check` waits for the first sums of all.
        usable: (frames,) bool; other frames are never drawn, and replace none. None: all are usable.
    """

    def __init__(
        self, manifests: Manifests, log_file: Path | None = None, held_out: np.ndarray | None = None,
        processes: int = 1, usable: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.manifests, self.processes = manifests, processes
        self.held_out = np.zeros(manifests.num_sequences, bool) if held_out is None else held_out
        sets = len(manifests.datasets)
        self._log = _LogFile(log_file) if log_file is not None else None
        self._lock = threading.Lock()
        self._first: dict[int, list[Path]] = {}
        self._state = np.zeros(manifests.num_frames, np.uint8)  # untouched pages take no memory
        lengths = np.diff(manifests.starts)
        if usable is not None:
            self._state[~usable] = NO_REPLACEMENT
            lengths = np.add.reduceat(usable, manifests.starts[:-1], dtype=np.int64)
        self._frames = np.bincount(manifests.dataset_of, lengths, minlength=sets)
        self._training = np.bincount(manifests.dataset_of[~self.held_out & (lengths > 0)], minlength=sets)
        self._tally = np.zeros((sets, 3))  # read sequences, sum of their shares of bad frames, read frames
        self._pooled: np.ndarray | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Bad frames by data set, without zeros: of all processes that share the log, or of this one without a log."""
        with self._lock:
            names = self.manifests.datasets
            if self._log is None:
                rows = np.flatnonzero(self._state == BAD)
                found = Counter(names[i] for i in self.manifests.dataset_of[self.manifests.sequence_of(rows)])
            else:
                self._log.update()
                found = Counter(dataset for dataset, _ in self._log.listed)
            return {name: found[name] for name in names if found[name]}

    def read(self, rows: np.ndarray, files: Sequence[Path], bad: Mapping[int, str]) -> None:
        """Record that the frames `rows` (n,) were read from `files`; `bad`: indices and reasons of the bad ones."""
        with self._lock:
            new = [i for i in bad if self._state[rows[i]] != BAD]
            sequences = np.unique(self.manifests.sequence_of(rows))
            datasets = self.manifests.dataset_of[sequences]
            np.subtract.at(self._tally, datasets, [self._counted(s) for s in sequences.tolist()])
            self._state[rows] = GOOD
            self._state[rows[list(bad)]] = BAD
            np.add.at(self._tally, datasets, [self._counted(s) for s in sequences.tolist()])
            for i in new:
                number = int(self.manifests.dataset_of[self.manifests.sequence_of(rows[i])])
                first = self._first.setdefault(number, [])
                if len(first) < NAMED:
                    first.append(files[i])
                    log.warning("'%s' cannot be decoded and is replaced by another frame: %s", files[i], bad[i])
                if self._log:
                    self._log.write(self.manifests.datasets[number], files[i], bad[i])

    def _counted(self, sequence: int) -> tuple[float, float, float]:
        """A sequence's part of the tally."""
        states = self._states(sequence)
        bad = int(np.count_nonzero(states == BAD))
        read = bad + int(np.count_nonzero(states == GOOD))
        return float(read > 0), bad / max(read, 1), read

    def _states(self, sequence: int) -> np.ndarray:
        first, end = self.manifests.starts[sequence : sequence + 2]
        return self._state[first:end]

    def known(self, sequence: int) -> bool:
        """Whether a sequence has a bad frame, found by this process or listed by another."""
        with self._lock:
            if (self._states(sequence) == BAD).any():
                return True
            if self._log is None:
                return False
            self._log.update()
            if not self._log.listed:
                return False
            dataset = self.manifests.datasets[self.manifests.dataset_of[sequence]]
            files = self.manifests.files(np.arange(*self.manifests.starts[sequence : sequence + 2]))
            return any((dataset, str(file)) in self._log.listed for file in files)

    def tally(self) -> np.ndarray:
        """Counts of this process for `check`, (data sets, 3) float64, to be summed over processes."""
        with self._lock:
            return self._tally.copy()

    def pool(self, total: np.ndarray) -> None:
        """Take the sums of the tallies of all processes, on which `check` decides from now on."""
        self._pooled = total

    def check(self) -> None:
        """Raise DataError if a data set has too many bad frames; call it after every batch.

        A batch of good frames can stop a run too: fewer unread frames mean a smaller standard error.
        """
        tally = self.tally() if self.processes == 1 else self._pooled
        for number, (sequences, bad, read) in enumerate(() if tally is None else tally.tolist()):
            total = int(self._frames[number])
            unread = max(0.0, 1 - read / (total * self.processes))
            error = math.sqrt(MAX_SHARE * (1 - MAX_SHARE) * sequences * unread)
            if (
                sequences >= min(MIN_SEQUENCES, SMALL_SEQUENCES * self._training[number])
                and read >= min(MIN_FRAMES, SMALL_FRAMES * total)
                and bad > MAX_SHARE * sequences + STANDARD_ERRORS * error + 1e-6  # sums are rounded
            ):
                raise DataError(self._too_many(number, bad / sequences, int(sequences)))

    def _too_many(self, number: int, share: float, sequences: int) -> str:
        dataset, files, listed = self.manifests.datasets[number], self._first.get(number, []), ""
        if self._log:
            others = (Path(file) for dataset_of, file in list(self._log.listed) if dataset_of == dataset)
            files, listed = files or list(islice(others, NAMED)), f"; all are listed in '{self._log.path}'"
        such = ", such as " * bool(files) + ", ".join(f"'{file}'" for file in files)
        failed = f"{share:.1%} of the frames of the data set '{dataset}' cannot be decoded"
        return f"{failed} ({sequences} sequences were read){such}{listed}; restore them, or leave the data set out"

    def replacements(self, row: int, taken: set[int]) -> Iterator[int]:
        """Rows that may replace a bad one, in an order that depends only on the arguments and the known bad frames.

        First the other frames of its sequence, from `row` on, those not in `taken` first. Then frames of the other
        sequences of its data set with the same `held_out` flag, those not in `taken` first: one of each, spread over
        the whole data set since neighbours may be bad too, then another one of each, and so on.
        """
        manifests = self.manifests
        own = int(manifests.sequence_of(row))
        first, end = manifests.starts[own : own + 2].tolist()
        rows = (first + (row - first + i) % (end - first) for i in range(1, end - first))
        near = (candidate for candidate in sorted(rows, key=taken.__contains__) if self._state[candidate] < BAD)
        yield from islice(near, MAX_TRIES // 2)
        for again in (False, True):
            for candidate in self._elsewhere(own, row - first):
                if self._state[candidate] < BAD and (candidate in taken) == again:
                    yield candidate

    def _elsewhere(self, own: int, offset: int) -> Iterator[int]:
        manifests = self.manifests
        alike = np.flatnonzero(
            (manifests.dataset_of == manifests.dataset_of[own]) & (self.held_out == self.held_out[own])
        )
        count, place = len(alike), int(np.searchsorted(alike, own))
        stride = next(s for s in range(max(1, round(0.618 * count)), count + 2) if math.gcd(s, count) == 1)
        sequences = alike[(place + stride * np.arange(1, count)) % count]
        lengths = np.diff(manifests.starts)[sequences]
        for i in range(lengths.max(initial=0)):
            for sequence, length in zip(sequences[i < lengths].tolist(), lengths[i < lengths].tolist(), strict=True):
                yield int(manifests.starts[sequence]) + (offset + i) % length

    def no_replacement(self, row: int) -> None:
        """Record that a frame was tried as a replacement and is bad: it is not tried again, and does not count."""
        if self._state[row] == UNREAD:
            self._state[row] = NO_REPLACEMENT

    def close(self) -> None:
        """Try once more to write the lines that wait."""
        if self._log:
            with self._lock:
                self._log.close()


class _LogFile:
    """Tab-separated bad frames, appended by several processes; lists each file of a data set once.

    Lines that cannot be written wait in memory, and are counted meanwhile. Warns once per outage.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listed: set[tuple[str, str]] = set()  # data set and file of every line read or written so far
        self._waiting: list[bytes] = []
        self._offset = 0  # of the last whole line that was read
        self._partial = self._failed = False  # the file ends within a line; the last attempt failed
        self.update()

    def update(self) -> None:
        """Read the lines that other processes appended, and write those that wait."""
        try:
            if self.path.is_file() and self.path.stat().st_size > self._offset:
                with open(self.path, "rb") as file:
                    file.seek(self._offset)
                    content = file.read()
                whole = content[: content.rfind(b"\n") + 1]
                self._offset, self._partial = self._offset + len(whole), len(whole) < len(content)
                for line in os.fsdecode(whole).split("\n"):
                    if line.count("\t") >= 2:
                        dataset, name, _ = line.split("\t", 2)
                        self.listed.add((dataset, name))
            self._flush()
        except OSError as error:
            self._warn(error)

    def write(self, dataset: str, file: Path, reason: str) -> None:
        """Append a line, unless the file is listed."""
        self.update()
        if (dataset, str(file)) not in self.listed:
            self.listed.add((dataset, str(file)))
            self._waiting.append(os.fsencode(f"{dataset}\t{file}\t{' '.join(reason.split())}\n"))
            self.update()

    def close(self) -> None:
        """Try once more to write what waits."""
        self.update()
        if self._waiting:
            log.warning("'%s': %d lines could not be written and are lost", self.path, len(self._waiting))

    def _flush(self) -> None:
        if not self._waiting:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(self.path, flags, 0o666), "wb", buffering=0) as out:
            while self._waiting:
                line = b"\n" * self._partial + self._waiting[0]
                if (out.write(line) or 0) < len(line):  # a disk that fills up accepts a part
                    return
                self._partial = False
                self._waiting.pop(0)
        if self._failed:
            log.info("'%s' can be written again", self.path)
        self._failed = False

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            log.warning("'%s' cannot be read or written (%s); training continues", self.path, error.strerror)
        self._failed = True

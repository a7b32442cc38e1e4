"""Background loading: threads decode the plans of the next steps while the current one trains.

Frames that cannot be decoded are replaced, counted and listed; too many stop the run.
"""

import contextlib
import ctypes
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmum.data.decode import Decoder
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests
from fastmum.data.plan import StepPlan
from fastmum.errors import writing

log = logging.getLogger(__name__)

MAX_SHARE = 0.05  # of a data set's frames
MIN_FRAMES = 20  # frames of a data set that must have been read before it can stop a run
STANDARD_ERRORS = 3.0  # by which the share must exceed MAX_SHARE while the data set has unread frames
MAX_SEQUENCES = 4  # searched for a replacement: the frame's own sequence and the next three
NAMED = 3  # files named in messages
TEXT: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names may be any bytes


class Batch(NamedTuple):
    """Decoded frames of a plan."""

    frames: Tensor  # (F, size, size, 3) uint8, sequence by sequence; on the GPU if the decoder works there
    lengths: tuple[int, ...]  # frames of each sequence


class Loader:
    """Decodes plans, whose rows index `manifests`, ahead of time and in order; each of `workers` threads a batch.

    Decoders release the GIL while they read, decode and resize, so threads suffice and share their caches. `bad_frames`
    and `held_out` are those of `Faults`; `wait_seconds` is how long callers of `batches` have waited in all.
    """

    def __init__(
        self, decoder: Decoder, manifests: Manifests, workers: int,
        bad_frames: Path | None = None, held_out: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.decoder, self.manifests, self.workers = decoder, manifests, workers
        self.wait_seconds = 0.0
        self.faults = Faults(manifests, bad_frames, held_out)

    def batches(self, plans: Iterable[StepPlan]) -> Iterator[Batch]:
        """Decoded batches in the order of the plans; up to `workers` batches are decoded ahead.

        On a GPU a batch may be used on the stream that is current when the next batch is requested. Raises the
        DataError of `load` in place of the batch.
        """
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode", initializer=_use_one_core)
        ahead: deque[Future[Batch]] = deque()
        in_use = _InUse()
        plans = iter(plans)
        try:
            while True:
                for plan in plans:
                    ahead.append(pool.submit(self.load, plan))
                    if len(ahead) > self.workers:
                        break
                if not ahead:
                    return
                start = time.perf_counter()
                batch = ahead.popleft().result()
                self.wait_seconds += time.perf_counter() - start
                try:
                    yield batch
                finally:  # also when the caller closes the generator
                    in_use.add(batch)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            in_use.wait()

    def load(self, plan: StepPlan) -> Batch:
        """Decode one plan in the calling thread; DataError if a frame cannot be replaced, or too many are bad."""
        frames, bad = self._decode(plan.rows, plan.crops, plan.flips)
        taken = set(plan.rows.tolist())
        for i in bad:
            frames[i], row = self._replacement(plan, i, taken)
            taken.add(row)
        if bad and frames.is_cuda:
            torch.cuda.current_stream(frames.device).synchronize()  # training uses another stream
        return Batch(frames, tuple(plan.lengths.tolist()))

    def _decode(self, rows: np.ndarray, crops: np.ndarray, flips: np.ndarray) -> tuple[Tensor, dict[int, str]]:
        """Decode frames and record the bad ones."""
        files = self.manifests.files(rows)
        frames, bad = self.decoder.decode(files, crops, flips)
        self.faults.read(rows)
        for i, reason in bad.items():
            self.faults.add(int(rows[i]), files[i], reason)
        self.faults.check()
        return frames, bad

    def _replacement(self, plan: StepPlan, index: int, taken: set[int]) -> tuple[Tensor, int]:
        """Another frame with the same crop and flip, and its row."""
        same = slice(index, index + 1)
        for row in self.faults.replacements(int(plan.rows[index]), taken):
            frames, bad = self._decode(np.array([row]), plan.crops[same], plan.flips[same])
            if not bad:
                return frames[0], row
        failed = f"'{self.manifests.file(int(plan.rows[index]))}' cannot be decoded, nor can its neighbours"
        raise DataError(f"{failed} in this and the next sequences; restore the files, or leave the data set out")


class Faults:
    """Counts bad frames, proposes replacements, and stops a run that has too many bad frames. Thread-safe.

    A data set stops the run when more than 5 % of its frames are bad. While frames are unread, the share among the read
    ones must exceed 5 % by three standard errors. Fewer than 20 read frames never stop a run.

    Args:
        log_file: gets one line per bad frame: data set, file, reason. Lines of an earlier start of the run, or of other
            processes, are counted and not repeated. DataError if it cannot be read or written.
        held_out: (sequences,) bool; held-out and training sequences never replace each other. None: all are training.
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
        """Record a bad frame, which must have been passed to `read`."""
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
        """
        with self._lock:
            for number, files in self._first.items():
                bad, read, total = self._found[number], self._read[number], self._total[number]
                error = np.sqrt(MAX_SHARE * (1 - MAX_SHARE) * read * (1 - read / total))
                if read < MIN_FRAMES or bad <= MAX_SHARE * read + STANDARD_ERRORS * error:
                    continue
                named = ", ".join(f"'{file}'" for file in files)
                named += f"; all are listed in '{self._log.path}'" if self._log else ""
                failed = f"{bad} of {read} frames of the data set '{self.manifests.datasets[number]}' cannot be decoded"
                raise DataError(f"{failed}, such as {named}; restore them, or leave the data set out")

    def replacements(self, row: int, taken: set[int]) -> Iterator[int]:
        """Rows that may replace a bad one, in an order that depends only on the arguments and the known bad frames.

        First the other frames of its sequence, from `row` on, those not in `taken` first; then the next sequences of
        its data set with the same `held_out` flag. Known bad frames are skipped.
        """
        manifests = self.manifests
        own = int(manifests.sequence_of(row))
        alike = (manifests.dataset_of == manifests.dataset_of[own]) & (self.held_out == self.held_out[own])
        sequences = np.flatnonzero(alike)
        place = int(np.searchsorted(sequences, own))
        for sequence in np.roll(sequences, -place)[:MAX_SEQUENCES].tolist():
            first, last = manifests.starts[sequence : sequence + 2].tolist()
            rows = (first + (row - first + i) % (last - first) for i in range(last - first))
            for candidate in sorted(rows, key=taken.__contains__):
                if candidate != row and candidate not in self._bad:
                    yield candidate


class _LogFile:
    """Tab-separated bad frames, appended by several processes; lists each file of a data set once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listed: set[tuple[str, str]] = set()  # data set and file of every line read or written so far
        self._offset = 0
        self.update()

    def update(self) -> None:
        """Read the lines that other processes appended."""
        try:
            if self.path.is_file() and self.path.stat().st_size > self._offset:
                with open(self.path, **TEXT) as file:
                    self._read(file)
        except OSError as error:
            raise DataError(f"'{self.path}' cannot be read ({error.strerror or error})") from None

    def write(self, dataset: str, file: Path, reason: str) -> None:
        """Append a line, unless the file is listed."""
        with writing(self.path, DataError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+", **TEXT) as out:
                self._read(out)
                if (dataset, str(file)) not in self.listed:
                    self.listed.add((dataset, str(file)))
                    out.write(f"{dataset}\t{file}\t{' '.join(reason.split())}\n")
                self._offset = out.tell()

    def _read(self, file: IO[str]) -> None:
        file.seek(self._offset)
        while line := file.readline():  # iteration would disable tell()
            if line.count("\t") >= 2:
                dataset, name, _ = line.split("\t", 2)
                self.listed.add((dataset, name))
        self._offset = file.tell()


class _InUse(deque[tuple[Batch, torch.cuda.Event]]):
    """Keeps references to GPU batches until the queued work on them is done.

    DALI reuses the memory of a batch as soon as Python holds no reference, even if kernels that read it are queued.
    """

    def add(self, batch: Batch) -> None:
        """Keep a batch until the work queued on the current stream is done."""
        if batch.frames.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(batch.frames.device))
            self.append((batch, event))
            while self and self[0][1].query():
                self.popleft()

    def wait(self) -> None:
        """Release all batches once their work is done."""
        while self:
            self[0][1].synchronize()
            self.popleft()


def _use_one_core() -> None:
    """Compute torch's operators in the calling thread alone; GNU's OpenMP only.

    Otherwise it gets OpenMP threads of its own. Once there are more than cores, none waits actively for work, also none
    of the training loop's, and a step takes up to twice the time.
    """
    torch.get_num_threads()  # sets the number of a new thread, if it was changed
    with contextlib.suppress(AttributeError, OSError):  # another OpenMP library, or none
        ctypes.CDLL(torch._C.__file__).omp_set_num_threads(1)

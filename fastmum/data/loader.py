"""Background loading: threads decode the plans of the next steps while the current one trains."""

import contextlib
import ctypes
import itertools
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastmum.data import staging
from fastmum.data.decode import Decoder
from fastmum.data.decode.image import FrameError, being_read, read_file
from fastmum.data.errors import DataError
from fastmum.data.faults import MAX_TRIES, Faults
from fastmum.data.manifest import Manifests
from fastmum.data.plan import StepPlan
from fastmum.errors import StoppedError

log = logging.getLogger(__name__)

POLL_S = 0.2  # seconds between looks at the stop signal, and between attempts to read a file
WARN_S = 30.0  # of waiting for a batch
GRACE_S = 3.0  # that a stop signal waits for a batch, and the end of a loader for its threads


class Batch(NamedTuple):
    """Decoded frames of a plan."""

    frames: Tensor  # (F, size, size, 3) uint8, sequence by sequence; on the GPU if the decoder works there
    lengths: tuple[int, ...]  # frames of each sequence


class Plan(Protocol):
    """What `PlanLoader` needs to know of a plan; it is a NamedTuple."""

    @property
    def rows(self) -> np.ndarray:
        """(F,) int64, rows of the manifests, sequence by sequence."""

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, frames of each sequence; they sum to F."""


P = TypeVar("P", bound=Plan)
B = TypeVar("B", bound=tuple)


class PlanLoader(ABC, Generic[P, B]):
    """Decodes plans, whose rows index `manifests`, ahead of time and in order; each of `workers` threads a batch.

    Decoders release the GIL while they read, decode and resize, so threads suffice and share their caches. Files that
    cannot be read for now (`image.TRANSIENT`) are retried for `retry_s` seconds, once for each sequence.
    `bad_frames`, `held_out`, `processes` and `usable` are those of `Faults`; `wait_seconds` is how long callers of
    `batches` have waited in all.
    """

    def __init__(
        self, manifests: Manifests, workers: int, bad_frames: Path | None = None, held_out: np.ndarray | None = None,
        processes: int = 1, retry_s: float = 0.0, usable: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.manifests, self.workers, self.retry_s = manifests, workers, retry_s
        self.wait_seconds = 0.0
        self.faults = Faults(manifests, bad_frames, held_out, processes, usable)
        self._closing = threading.Event()

    @abstractmethod
    def decode(self, plan: P, at: np.ndarray, rows: np.ndarray) -> tuple[Any, dict[int, str]]:
        """Decode `rows` (k,) as the frames `at` (k,) of the plan.

        Returns a list or tensor of k frames, and index (below k) and reason of those that cannot be decoded.
        """

    @abstractmethod
    def finish(self, plan: P, frames: Any) -> B:
        """The batch of a plan from all its decoded frames."""

    def files_of(self, row: int) -> list[Path]:
        """The files that a frame is read from."""
        return [self.manifests.file(row)]

    def files_of_plan(self, plan: P) -> list[Path]:
        """The files that a plan's frames are read from."""
        return self.manifests.files(plan.rows)

    def batches(self, plans: Iterable[P], stopping: Callable[[], bool] = lambda: False) -> Iterator[B]:
        """Decoded batches in the order of the plans; up to `workers` batches are decoded ahead.

        On a GPU a batch may be used on the stream that is current when the next batch is requested. Raises the
        DataError of `load` in place of the batch, and StoppedError when the batch is late and `stopping` is true.
        """
        jobs: queue.SimpleQueue[tuple[Future[B], P] | None] = queue.SimpleQueue()
        # Not an executor, which would wait for a read that never returns when Python exits.
        threads = [
            threading.Thread(target=_work, args=(jobs, self.load), name=f"decode_{i}", daemon=True)
            for i in range(self.workers)
        ]
        ahead: deque[Future[B]] = deque()
        in_use = _InUse()
        plans = iter(staging.copied_ahead(plans, self.files_of_plan))
        self._closing.clear()
        try:
            for thread in threads:
                thread.start()
            while True:
                for plan in plans:
                    ahead.append(Future())
                    jobs.put((ahead[-1], plan))
                    if len(ahead) > self.workers:
                        break
                if not ahead:
                    return
                start = time.perf_counter()
                _wait(ahead[0], threads, stopping)
                batch = ahead.popleft().result()
                self.wait_seconds += time.perf_counter() - start
                try:
                    yield batch
                finally:  # also when the caller closes the generator
                    in_use.add(batch)
        finally:
            self._closing.set()
            for future in ahead:
                future.cancel()
            for _ in threads:
                jobs.put(None)
            end = time.monotonic() + GRACE_S
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
            in_use.wait()

    def load(self, plan: P) -> B:
        """Decode one plan in the calling thread; DataError if a frame cannot be replaced, or too many are bad."""
        files = self.manifests.files(plan.rows)
        with staging.reading_ahead(self.files_of_plan(plan)):
            frames, bad = self.decode(plan, np.arange(len(plan.rows)), plan.rows)
        changed = bool(bad)
        if bad and self.retry_s:
            bad = self._retry(plan, files, frames, bad)
        self.faults.read(plan.rows, files, bad)
        self.faults.check()
        plan = self.replace(plan, frames, bad) if bad else plan
        if changed and isinstance(frames, Tensor) and frames.is_cuda:
            torch.cuda.current_stream(frames.device).synchronize()  # training uses another stream
        return self.finish(plan, frames)

    def replace(self, plan: P, frames: Any, bad: Iterable[int]) -> P:
        """Put other frames in place of the bad ones; returns the plan of the frames that are there now."""
        taken = set(plan.rows.tolist())
        for i in bad:
            frames[i], row = self.replacement(plan, i, int(plan.rows[i]), taken)
            taken.add(row)
        return plan

    def replacement(self, plan: P, index: int, row: int, taken: set[int]) -> tuple[Any, int]:
        """Another frame than `row`, decoded as the frame `index` of the plan, and its row."""
        tried = 0
        for candidate in itertools.islice(self.faults.replacements(row, taken), MAX_TRIES):
            if (frame := self.try_row(plan, index, candidate)) is not None:
                return frame, candidate
            tried += 1
        dataset = self.manifests.datasets[self.manifests.dataset_of[self.manifests.sequence_of(row)]]
        failed = f"'{self.manifests.file(row)}' and {tried} other frames of the data set '{dataset}' cannot be decoded"
        raise DataError(f"{failed}; restore them, or leave the data set out")

    def try_row(self, plan: P, index: int, row: int) -> Any:
        """A row, decoded as the frame `index` of the plan; None if it is bad, which does not count."""
        frames, bad = self.decode(plan, np.array([index]), np.array([row]))
        if not bad:
            return frames[0]
        self.faults.no_replacement(row)
        return None

    def _retry(self, plan: P, files: list[Path], frames: Any, bad: Mapping[int, str]) -> dict[int, str]:
        """Decode bad frames again as soon as their files can be read; returns those that stay bad."""
        sequences, bad = self.manifests.sequence_of(plan.rows), dict(bad)
        known = {s: self.faults.known(s) for s in {int(sequences[i]) for i in bad}}
        waiting, end = [i for i in bad if not known[int(sequences[i])]], time.monotonic() + self.retry_s
        while waiting:
            readable = [i for i in waiting if not any(map(_is_transient, self.files_of(int(plan.rows[i]))))]
            if readable:
                again, still = self.decode(plan, np.array(readable), plan.rows[readable])
                for j, i in enumerate(readable):
                    if j not in still:
                        frames[i] = again[j]
                        del bad[i]
            waiting = [i for i in waiting if i not in readable]
            if time.monotonic() > end or (waiting and self._closing.wait(POLL_S)):
                break
        if waiting and self._closing.is_set():
            raise StoppedError(f"'{files[waiting[0]]}' was not read")
        return bad


class Loader(PlanLoader[StepPlan, Batch]):
    """Loads the batches of pretraining: frames of a decoder. The other arguments are those of `PlanLoader`."""

    def __init__(self, decoder: Decoder, manifests: Manifests, workers: int, *args: Any, **options: Any) -> None:
        super().__init__(manifests, workers, *args, **options)
        self.decoder = decoder

    def decode(self, plan: StepPlan, at: np.ndarray, rows: np.ndarray) -> tuple[Tensor, dict[int, str]]:
        """Frames (k, size, size, 3) uint8 with the crops and flips of the plan."""
        return self.decoder.decode(self.manifests.files(rows), plan.crops[at], plan.flips[at])

    def finish(self, plan: StepPlan, frames: Tensor) -> Batch:
        """The frames and the lengths of their sequences."""
        return Batch(frames, tuple(plan.lengths.tolist()))


def _is_transient(file: Path) -> bool:
    """Whether a transient error prevents reading a file."""
    try:
        read_file(file)
    except FrameError as error:
        return error.transient
    return False


def _work(jobs: "queue.SimpleQueue[tuple[Future[B], P] | None]", load: Callable[[P], B]) -> None:
    """Thread that decodes plans until it gets None."""
    _use_one_core()
    while (job := jobs.get()) is not None:
        future, plan = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(load(plan))
            except BaseException as error:  # raised by the caller of `batches`
                future.set_exception(error)
        being_read.pop(threading.get_ident(), None)
        del job, future  # or the batch would stay in memory


def _wait(future: "Future[B]", threads: list[threading.Thread], stopping: Callable[[], bool]) -> None:
    """Wait for a batch, and warn when it is late; StoppedError if it is late and `stopping` is true."""
    began, stopped, warn_s = time.monotonic(), None, WARN_S
    while not wait((future,), POLL_S).done:
        now = time.monotonic()
        names = ", ".join(f"'{file}'" for t in threads if (file := being_read.get(t.ident or 0)))
        late = f"waiting for a batch for {now - began:.0f} s; files being read: {names or 'none'}"
        if now - began > warn_s:
            log.warning("%s", late)
            warn_s *= 2
        if stopping():
            stopped = stopped or now
            if now - stopped > GRACE_S:
                raise StoppedError(late)


class _InUse(deque[tuple[tuple, torch.cuda.Event]]):
    """Keeps references to GPU batches until the queued work on them is done.

    Loader threads allocate them on other streams, so torch may use the memory of a batch again as soon as Python holds
    no reference, even if kernels that read it are queued.
    """

    def add(self, batch: tuple) -> None:
        """Keep a batch until the work queued on the current stream is done."""
        if on_gpu := [x for x in batch if getattr(x, "is_cuda", False)]:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(on_gpu[0].device))
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

"""Batches in the background: threads decode the plans of the coming steps while the current one trains."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmum.data.decode import Decoder
from fastmum.data.errors import DataError
from fastmum.data.faults import Faults
from fastmum.data.manifest import Manifests
from fastmum.data.plan import StepPlan


class Batch(NamedTuple):
    """What a step trains on.

    Args:
        frames: (F, size, size, 3) uint8, sequences one behind another; on the GPU if the decoder works there.
        lengths: frames of every sequence.
    """

    frames: Tensor
    lengths: tuple[int, ...]


class Loader:
    """Decodes plans ahead of time, in order.

    Decoders release Python's lock where they read, decode and resize, so threads are enough, and share what they keep.

    Args:
        decoder: decodes the frames of a plan.
        manifests: the plans' rows are of.
        workers: threads, each with a whole batch at a time.
        bad_frames: file that lists the frames that cannot be decoded.
        held_out: (sequences,) bool, see `Faults`.

    Attributes:
        wait_seconds: time that callers of `batches` have waited for a batch.
        faults: the frames that cannot be decoded.
    """

    def __init__(
        self,
        decoder: Decoder,
        manifests: Manifests,
        workers: int,
        bad_frames: Path | None = None,
        held_out: np.ndarray | None = None,
    ) -> None:
        self.decoder = decoder
        self.manifests = manifests
        self.workers = workers
        self.wait_seconds = 0.0
        self.faults = Faults(manifests, bad_frames, held_out)

    def batches(self, plans: Iterable[StepPlan]) -> Iterator[Batch]:
        """Decoded batches in the order of the plans; as many batches as workers are decoded ahead.

        On a GPU a batch may be used on the stream that is current when the next one is asked for.

        Raises:
            DataError: as `load`, in place of the batch.
        """
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
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
                finally:  # also where the caller stops in the middle
                    in_use.add(batch)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            in_use.wait()

    def load(self, plan: StepPlan) -> Batch:
        """Decode one plan in the calling thread.

        Raises:
            DataError: a frame that cannot be replaced, or too many that had to be.
        """
        files = self.manifests.files(plan.rows)
        frames, bad = self.decoder.decode(files, plan.crops, plan.flips)
        self._note(plan.rows, files, bad)
        taken = set(plan.rows.tolist())
        others = {}
        for i in bad:
            others[i], row = self._replacement(plan, i, taken)
            taken.add(row)
        for i, frame in others.items():
            frames[i] = frame
        if others and frames.is_cuda:
            torch.cuda.current_stream(frames.device).synchronize()  # those who train on them use another stream
        return Batch(frames, tuple(plan.lengths.tolist()))

    def _note(self, rows: np.ndarray, files: list[Path], bad: dict[int, str]) -> None:
        self.faults.read(rows)
        for i, reason in bad.items():
            self.faults.add(int(rows[i]), files[i], reason)
        self.faults.check()

    def _replacement(self, plan: StepPlan, index: int, taken: set[int]) -> tuple[Tensor, int]:
        """Another frame with the same crop and flip, and its row."""
        same = slice(index, index + 1)
        for row in self.faults.replacements(int(plan.rows[index]), taken):
            files = self.manifests.files([row])
            frames, bad = self.decoder.decode(files, plan.crops[same], plan.flips[same])
            self._note(np.array([row]), files, bad)
            if not bad:
                return frames[0], row
        file = self.manifests.file(int(plan.rows[index]))
        raise DataError(
            f"'{file}' cannot be decoded, nor can any other frame of its sequence or of those that may replace it; "
            "restore the files, or leave the data set out"
        )


class _InUse:
    """Batches on a GPU whose memory must not be used again yet.

    DALI takes the memory of a batch back as soon as nothing in Python refers to it, although the work on it that the
    caller has queued may still lie ahead.
    """

    def __init__(self) -> None:
        self._batches: deque[tuple[Batch, torch.cuda.Event]] = deque()

    def add(self, batch: Batch) -> None:
        """Keep a batch until the work that is queued on the current stream is done."""
        if not batch.frames.is_cuda:
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(batch.frames.device))
        self._batches.append((batch, event))
        while self._batches and self._batches[0][1].query():
            self._batches.popleft()

    def wait(self) -> None:
        """Let go of all batches as soon as that is safe."""
        while self._batches:
            self._batches[0][1].synchronize()
            self._batches.popleft()

"""Background loading: threads decode the plans of the next steps while the current one trains."""

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
    """Decoded frames of a plan.

    Args:
        frames: (F, size, size, 3) uint8, sequence by sequence; on the GPU if the decoder works there.
        lengths: frames of each sequence.
    """

    frames: Tensor
    lengths: tuple[int, ...]


class Loader:
    """Decodes plans ahead of time, in order.

    Decoders release the GIL while they read, decode and resize, so threads suffice and share their caches.

    Args:
        decoder: decodes the frames of a plan.
        manifests: the plans' rows index these.
        workers: threads; each decodes a whole batch at a time.
        bad_frames: file that lists the frames that cannot be decoded.
        held_out: (sequences,) bool, see `Faults`.

    Attributes:
        wait_seconds: total time that callers of `batches` waited for a batch.
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
        """Decoded batches in the order of the plans; up to `workers` batches are decoded ahead.

        On a GPU a batch may be used on the stream that is current when the next batch is requested.

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
                finally:  # also when the caller closes the generator
                    in_use.add(batch)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            in_use.wait()

    def load(self, plan: StepPlan) -> Batch:
        """Decode one plan in the calling thread.

        Raises:
            DataError: a frame that cannot be replaced, or too many bad frames.
        """
        frames, bad = self._decode(plan.rows, plan.crops, plan.flips)
        taken = set(plan.rows.tolist())
        replaced = {}
        for i in bad:
            replaced[i], row = self._replacement(plan, i, taken)
            taken.add(row)
        for i, frame in replaced.items():
            frames[i] = frame
        if replaced and frames.is_cuda:
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
        file = self.manifests.file(int(plan.rows[index]))
        raise DataError(
            f"'{file}' cannot be decoded, nor can any other frame of its sequence or of the next; restore the files, "
            "or leave the data set out"
        )


class _InUse:
    """Keeps references to GPU batches until the queued work on them is done.

    DALI reuses the memory of a batch as soon as Python holds no reference, even if kernels that read it are queued.
    """

    def __init__(self) -> None:
        self._batches: deque[tuple[Batch, torch.cuda.Event]] = deque()

    def add(self, batch: Batch) -> None:
        """Keep a batch until the work queued on the current stream is done."""
        if not batch.frames.is_cuda:
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(batch.frames.device))
        self._batches.append((batch, event))
        while self._batches and self._batches[0][1].query():
            self._batches.popleft()

    def wait(self) -> None:
        """Release all batches once their work is done."""
        while self._batches:
            self._batches[0][1].synchronize()
            self._batches.popleft()

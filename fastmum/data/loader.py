"""Batches in the background: threads decode the plans of the coming steps while the current one trains."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmum.data.decode import Decoder
from fastmum.data.plan import Crop, StepPlan
from fastmum.data.sequences import DataError

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What a step trains on.

    Args:
        frames: (F, size, size, 3) uint8 on the CPU, sequences one behind another.
        lengths: frames of every sequence.
    """

    frames: Tensor
    lengths: tuple[int, ...]


class Loader:
    """Decodes plans ahead of time, in order.

    Pillow releases Python's lock while it decodes and resizes, so threads are enough, and the cache is shared.

    Args:
        decoder: decodes one frame.
        workers: threads, each with a whole batch at a time.
        pin_memory: hand out page-locked memory, from which copies to a GPU are asynchronous.
    """

    def __init__(self, decoder: Decoder, workers: int, pin_memory: bool = False) -> None:
        self.decoder = decoder
        self.workers = workers
        self.pin_memory = pin_memory
        self.wait_seconds = 0.0
        self.bad_files: set[Path] = set()

    def batches(self, plans: Iterable[StepPlan]) -> Iterator[Batch]:
        """Decoded batches in the order of the plans; `wait_seconds` grows while the caller waits for one."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        ahead: deque[Future[Batch]] = deque()
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
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def load(self, plan: StepPlan) -> Batch:
        """Decode one plan in the calling thread.

        Raises:
            DataError: a sequence of which no frame can be read.
        """
        size = self.decoder.size
        frames = torch.empty(len(plan.files), size, size, 3, dtype=torch.uint8, pin_memory=self.pin_memory)
        out = frames.numpy()
        for i, (file, spare, crop) in enumerate(zip(plan.files, plan.spare, plan.crops, strict=True)):
            out[i] = self._frame(file, spare, crop)
        return Batch(frames, plan.lengths)

    def _frame(self, file: Path, spare: tuple[Path, ...], crop: Crop) -> np.ndarray:
        """The frame, or the next of its sequence that can be read."""
        begin = spare.index(file)
        for candidate in spare[begin:] + spare[:begin]:
            try:
                return self.decoder.frame(candidate, crop)
            # Pillow reports broken files with these; SyntaxError is its PNG reader's.
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                if candidate not in self.bad_files:
                    self.bad_files.add(candidate)
                    log.warning("'%s' cannot be read and is replaced by another frame: %s", candidate, error)
        raise DataError(f"no image in '{file.parent}' can be read; remove the folder or restore its files")

"""Device, precision and dtypes of a process, its batches on the device, and memory settings of the CPU."""

import ctypes
import logging
import os
import re
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmum.config.schema import ConfigError
from fastmum.engine.distributed import LaunchInfo
from fastmum.errors import FastmumError

log = logging.getLogger(__name__)

# dtype of the matrices that the model computes with; fp8 rounds further at each product.
MATRIX_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """bfloat16 autocast, off for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")


def pick_precision(name: str, device: torch.device) -> str:
    """Resolve `train.precision`: auto is bf16, but fp32 on CPUs that multiply bfloat16 in plain loops."""
    slow = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if name == "bf16" and slow:
        log.warning("this CPU multiplies bfloat16 in float32; train.precision=fp32 is as fast and does not round")
    return name if name != "auto" else "fp32" if slow else "bf16"


def pick_device(name: str, launch: LaunchInfo | None = None, key: str = "train.device") -> torch.device:
    """The device auto, cpu, cuda or cuda:N; with several processes on a machine each gets a separate GPU.

    ConfigError: no such device, or fewer than processes; the message names the option `key`.
    """
    launch = launch or LaunchInfo()
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"{key} is '{name}', but must be auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if launch.size > 1:
        if device.index is not None:
            raise ConfigError(f"{key} is '{name}', but several processes need one GPU each: use cuda")
        # srun may show each task only its own GPU.
        device = torch.device("cuda", launch.local_rank if count > 1 else 0)
    if (device.index or 0) >= count:
        process = f", and this is process {launch.local_rank} of {launch.local_size} on its machine"
        raise ConfigError(f"{key} is '{name}', but torch sees {count} CUDA devices{process if launch.size > 1 else ''}")
    return device


def make_deterministic(device: torch.device) -> None:
    """Let a process on CUDA compute the same bits in every run, before the first product; on the CPU it does anyway.

    An operator without a deterministic kernel raises torch's RuntimeError. With warnings in its place, the backward
    passes of torch's attention would add in any order, too, though they have deterministic kernels.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # every value is written
    torch.backends.cuda.enable_cudnn_sdp(False)  # it adds in any order
    torch.backends.cudnn.benchmark = False
    log.info(
        "train.deterministic: gradients of attention are added in a fixed order, which takes more time and memory in "
        "its backward pass; attention's kernel is not measured, and cuDNN's is not used"
    )


def keep_freed_memory() -> bool:
    """Configure glibc to keep freed memory; returns False with other C libraries.

    Otherwise the system takes the pages of gradients and activations back in every step, and clears them again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library or system
        return False
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a pytree; copies to a GPU start from pinned memory and are not waited for."""

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        pinned = x.pin_memory() if device.type == "cuda" and not x.is_cuda else x
        return pinned.to(device, non_blocking=True)

    return pytree.tree_map(move, batch)


class Prefetcher:
    """Iterates over a task's batches (pytrees of tensors) and moves them to the device, on CUDA one ahead.

    `wait_seconds` is the time that the training loop has waited for `batches`. `error` is what `batches` raised for the
    user; from then on each batch is the one before, so that the step can end on all processes.
    """

    def __init__(self, batches: Iterator[Any], device: torch.device) -> None:
        self.wait_seconds = 0.0
        self.error: FastmumError | None = None
        self._last: Any = None
        self._started = False  # `_last` has not been returned
        self._source, self._device = batches, device
        on_cpu = (to_device(batch, device) for batch in self._timed())
        self._moved: Generator[Any, None, None] = self._ahead() if device.type == "cuda" else on_cpu

    def start(self) -> None:
        """Wait for the first batch."""
        self._fetch()
        self._started = True

    def __next__(self) -> Any:
        if not self._started:
            self._fetch()
        self._started = False
        return self._last

    def _fetch(self) -> None:
        if self.error is None:
            try:
                self._last = next(self._moved)
            except FastmumError as error:
                self.error = error

    def close(self) -> None:
        """Stop the source."""
        self._moved.close()
        if hasattr(self._source, "close"):
            self._source.close()

    def _timed(self) -> Iterator[Any]:
        while True:
            began = time.perf_counter()
            batch = next(self._source, None)
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _ahead(self) -> Generator[Any, None, None]:
        copies = torch.cuda.Stream(self._device)
        waiting: tuple[Any, torch.cuda.Event] | None = None
        for batch in self._timed():
            if any(isinstance(x, Tensor) and x.is_cuda for x in pytree.tree_leaves(batch)):
                # Decoded on the GPU by DALI, whose memory must not be held beyond the next batch.
                yield to_device(batch, self._device)
                continue
            with torch.cuda.stream(copies):
                moved = to_device(batch, self._device)
                done = torch.cuda.Event()
                done.record(copies)
            if waiting is not None:
                yield self._arrived(*waiting)
            waiting = moved, done
        if waiting is not None:
            yield self._arrived(*waiting)

    def _arrived(self, batch: Any, copied: torch.cuda.Event) -> Any:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        for x in pytree.tree_leaves(batch):
            if isinstance(x, Tensor):
                x.record_stream(stream)  # allocated on the other stream
        return batch

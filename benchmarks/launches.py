"""Record the launches of the Triton kernels instead of performing them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from fastmum.kernels import dispatch

MULTIPROCESSORS = {80: 108, 90: 132}  # A100; H100 and H200 (SXM), data sheets


class Launch(NamedTuple):
    """The arguments of a launch."""

    kernel: Callable
    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, object]
    num_warps: int
    num_stages: int


class Recorder:
    """Takes launches in the place of the device, whose properties are those of an architecture."""

    def __init__(self, arch: int) -> None:
        self.arch, self.multiprocessors = arch, MULTIPROCESSORS[arch]
        self.launches: list[Launch] = []

    def launch(self, *arguments) -> None:
        self.launches.append(Launch(*arguments))


@contextmanager
def recorded_launches(arch: int) -> Iterator[list[Launch]]:
    """Record launches for `arch`, 80 or 90; tensors may be meta tensors."""
    dispatch.recorder = recorder = Recorder(arch)
    try:
        yield recorder.launches
    finally:
        dispatch.recorder = None

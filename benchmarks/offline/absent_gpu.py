"""An absent GPU: queries of Inductor and Triton about the device are answered from the table.

Nothing runs on it. Its tensors are fake; Triton code for it is compiled by the `ptxas` of Triton's wheel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
import torch.utils._triton
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from benchmarks.offline.gpus import Gpu

DEVICE = torch.device("cuda", 0)
REMEMBERED = (torch.utils._triton.has_triton, torch.utils._triton.triton_backend, DeviceProperties.create)


class _Driver(DriverBase):
    """A driver of Triton that has a target and cannot launch."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return DEVICE.index

    def get_active_torch_device(self) -> torch.device:
        return DEVICE

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_benchmarker(self) -> None:
        raise NotImplementedError("nothing is timed")


@contextmanager
def absent_gpu(gpu: Gpu) -> Iterator[None]:
    """Within it, Inductor lowers for `gpu` as if it were device 0."""
    properties = SimpleNamespace(
        name=gpu.name,
        major=gpu.arch // 10,
        minor=gpu.arch % 10,
        multi_processor_count=gpu.multiprocessors,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2_048,
        max_threads_per_block=1_024,
        warp_size=32,
        total_memory=gpu.memory,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=gpu.shared_memory,
        shared_memory_per_multiprocessor=gpu.shared_memory_multiprocessor,
        L2_cache_size=gpu.l2,
    )
    answers = {
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "current_device": lambda: DEVICE.index,
        "device_count": lambda: 1,
        "device": lambda *_: nullcontext(),
        "is_bf16_supported": lambda *_, **__: True,
    }
    interface = {name: staticmethod(answers[name]) for name in answers if name != "get_device_capability"}
    interface |= {"is_available": staticmethod(lambda: True), "get_raw_stream": staticmethod(lambda *_: 0)}
    worker = {name: interface[name] for name in ("get_device_properties", "current_device")}
    before = triton.runtime.driver._active
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **answers))
        stack.enter_context(mock.patch.multiple(CudaInterface, **interface))
        stack.enter_context(mock.patch.multiple(CudaInterface.Worker, **worker))
        # It would search for a real driver.
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        triton.runtime.driver.set_active(_Driver(gpu.arch))
        try:
            _forget()
            yield
        finally:
            triton.runtime.driver._active = before
            _forget()


def _forget() -> None:
    for function in REMEMBERED:
        function.cache_clear()

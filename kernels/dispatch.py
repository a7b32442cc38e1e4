"""The choice between the Triton and PyTorch implementations, and the launch of Triton kernels.

`FASTMUM_KERNELS`, read at the first call: "auto" (default) selects Triton on CUDA and PyTorch elsewhere; "torch" and
"triton" force one. Triton kernels run on CPU tensors if `TRITON_INTERPRET=1` was set before the import.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: everything runs in PyTorch
    triton, tl = None, SimpleNamespace(constexpr=None)

recorder: Any = None  # of `benchmarks.launches`, in the place of the device
choices: dict[str, str] = {}  # environment variables that were read
recording = threading.local()  # `tape`: the allocations and launches of a call that `plans` records


def jit(do_not_specialize: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """`triton.jit`, or the identity without Triton.

    `do_not_specialize` names integers that vary between batches: Triton would recompile for 1 and for multiples of 16.
    """
    if triton is None:
        return lambda fn: fn
    return triton.jit(do_not_specialize=list(do_not_specialize))


def choice(name: str, *allowed: str) -> str:
    """The environment variable `name`, the first one allowed if it is not set; read once, see `plans.reset`.

    ValueError: another value.
    """
    value = choices.get(name)
    if value is None:
        value = os.environ.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, but must be {', '.join(allowed[:-1])} or {allowed[-1]}")
        choices[name] = value
    return value


choice._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a constant of compiled code


def use_triton(x: Tensor) -> bool:
    """Whether an operation on `x` runs as a Triton kernel; float64 never does.

    ValueError: `FASTMUM_KERNELS` has an unknown value. RuntimeError: it selects Triton where Triton cannot run.
    """
    if recorder is not None:
        return True
    chosen = choice("FASTMUM_KERNELS", "auto", "torch", "triton")
    if chosen == "torch" or x.dtype == torch.float64:
        return False
    if chosen == "auto":
        return x.is_cuda and triton is not None
    if triton is None:
        raise RuntimeError("FASTMUM_KERNELS=triton, but Triton is not installed")
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"FASTMUM_KERNELS=triton, but the tensors are on {x.device}: set TRITON_INTERPRET=1 before the program "
            "starts to interpret the kernels there"
        )
    return True


def is_recorded() -> bool:
    """Whether launches are recorded instead of performed."""
    return recorder is not None


def launch(
    kernel: Callable, grid: tuple[int, ...], *args: object, num_warps: int, num_stages: int = 3, **constants: object
) -> None:
    """Launch a jitted kernel on the device of its first argument, unless the grid is empty."""
    if recorder is not None:
        recorder.launch(kernel, grid, args, constants, num_warps, num_stages)
    elif 0 not in grid:
        device = args[0].device
        options = constants | {"num_warps": num_warps, "num_stages": num_stages}
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            compiled = kernel[grid](*args, **options)
        if tape := getattr(recording, "tape", None):
            tape.launches.append((kernel, grid, args, options, compiled))


def empty(*size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, for host functions of kernels."""
    out = torch.empty(*size, dtype=dtype, device=device)
    if tape := getattr(recording, "tape", None):
        tape.created.append(out)
    return out


def tile_bytes(device: torch.device) -> int:
    """Bytes that one program should have in flight.

    Little's law: each SM needs bandwidth x latency / number of SMs in flight, about 10 kB on an A100 and 20 kB on an
    H100 or H200. With the 4 to 8 programs that fit an SM at least, these tiles are twice that.
    """
    return 4096 if architecture(device) < 90 else 8192


def architecture(device: torch.device) -> int:
    """Compute capability of the GPU, times ten; 80 in the interpreter."""
    return _capability(device) if recorder is None else recorder.arch


@lru_cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU, for kernels whose programs process many rows each."""
    return _multiprocessors(device) if recorder is None else recorder.multiprocessors


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # in the interpreter: more than one program
    return torch.cuda.get_device_properties(device).multi_processor_count


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()

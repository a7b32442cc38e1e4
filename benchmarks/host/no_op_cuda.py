"""A CUDA device on a machine without one, which queues everything and computes nothing.

`no_op_cuda.c` takes the place of the CUDA runtime, the driver and cuBLAS in a process that preloads it: PyTorch's CUDA
build and Triton run as on a GPU, down to the launches, which are counted. Memory is reserved and holds zeros.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
from pathlib import Path

from fastmum.errors import FastmumError

SOURCE = Path(__file__).with_name("no_op_cuda.c")
NAME = "libcuda.so.1"  # Triton and PyTorch open the driver by this name
LIBRARIES = ("torch_cuda", "c10_cuda", "torch_python", "caffe2_nvrtc")  # of PyTorch, whose symbols are needed
SYMBOL = re.compile(r"(__cuda|cuda[A-Z]|cu[A-Z]|cublas)(?!File)\w*")
COUNTERS = ("launches", "copies", "mallocs", "waits", "captured", "captured_copies", "replays")


class NoCudaError(FastmumError):
    """The device cannot be made here."""


def build(folder: Path) -> Path:
    """Compile the library into a folder, with the GNU tools.

    NoCudaError: a tool, Triton, or a CUDA build of PyTorch is missing.
    """
    torch, triton = (_package(name) for name in ("torch", "triton"))
    libraries = [torch / f"lib/lib{name}.so" for name in LIBRARIES]
    if not libraries[0].is_file():
        raise NoCudaError("this build of torch has no CUDA: install one that has, which needs no GPU")
    include = triton / "backends/nvidia/include"  # the CUDA headers that Triton brings
    compiled, rest, library = folder / "no_op_cuda.o", folder / "rest.c", folder / NAME
    _run("gcc", "-c", "-fPIC", "-O1", "-w", f"-I{include}", SOURCE, "-o", compiled)
    defined = set(_run("nm", "--defined-only", compiled).split())
    needed = {line.split()[-1].split("@")[0] for line in _run("nm", "-D", "--undefined-only", *libraries).splitlines()
              if line.strip() and not line.endswith(":")}  # fmt: skip
    names = sorted(name for name in needed - defined if SYMBOL.fullmatch(name))
    rest.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in names))
    _run("gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{NAME}", rest, compiled, "-o", library, "-ldl")
    return library


def environment(library: Path, arch: int) -> dict[str, str]:
    """Variables of a process that is to see a device of this compute capability, 80 or 90."""
    ours = {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": str(library.parent), "NO_OP_ARCH": str(arch)}
    ours["FASTMUM_PRODUCTS"] = "fused"  # as recorded: nothing can be measured on this device
    return {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET",)} | ours


def counts() -> dict[str, int]:
    """What was asked of the device so far, in a process that has it."""
    library = ctypes.CDLL(NAME)
    return {name: ctypes.c_long.in_dll(library, f"no_op_{name}").value for name in COUNTERS}


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise NoCudaError(f"the package '{name}' is not installed: pip install {name}")
    return Path(spec.origin).parent


def _run(*words: object) -> str:
    try:
        return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise NoCudaError(f"the program '{words[0]}' is not found: install gcc and binutils") from None
    except subprocess.CalledProcessError as error:
        raise NoCudaError(f"{words[0]} failed: {error.stderr.strip().splitlines()[0]}") from None

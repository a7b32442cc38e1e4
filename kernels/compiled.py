"""What the compiler makes of a launch, on a machine without a GPU.

A recorded launch is compiled to a cubin for an architecture, as Triton would on its first call there, and the cubin is
taken apart with the tools in Triton's wheel: registers, spills, shared memory, and the width of every access to
global memory, attributed to the source line and so to the tensor that it belongs to.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmum.kernels.dispatch import Launch

POINTERS = {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
}
ALIGNED = [["tt.divisibility", 16]]
ACCESS = re.compile(r"\b(LDG|STG)\.(\S+)")
LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
CALLS = {"LDG": "load", "STG": "store"}
NARROW = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


class Compiled(NamedTuple):
    """A compiled launch.

    Args:
        registers: of a thread.
        spills: bytes of registers that a thread stores to local memory and loads from there.
        shared: bytes of shared memory of a program.
        accesses: number of instructions by (tensor, bytes of a thread).
    """

    registers: int
    spills: int
    shared: int
    accesses: Counter[tuple[str, int]]

    def vector_share(self, streams: tuple[str, ...]) -> float:
        """Share of the bytes of `streams` that travel in accesses of 16 bytes a thread."""
        total = sum(n * width for (name, width), n in self.accesses.items() if name in streams)
        wide = sum(n * width for (name, width), n in self.accesses.items() if name in streams and width == 16)
        return wide / total


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile for compute capability `arch` (80, 90) and read what came of it."""
    signature, constants, attributes = specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    with triton.knobs.compilation.scope():
        # A cached cubin has the line numbers of the day it was made.
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _tool("cuobjdump", compiled.asm["cubin"], "--dump-resource-usage")
    sass = _tool("nvdisasm", compiled.asm["cubin"], "--print-line-info", "--print-code")
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    return Compiled(registers, spills(compiled.asm["ptx"]), compiled.metadata.shared, _accesses(sass))


def spills(ptx: str) -> int:
    """Bytes of registers that the assembler spills, stores and loads; arrays on the stack, as of sines, are none."""
    target = re.search(r"^\.target (\w+)", ptx, re.M).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [_path("ptxas"), "--verbose", f"--gpu-name={target}", "--output-file=/dev/null", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", said)))


def specialise(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and alignments of a launch, by Triton's rules for arguments of a call."""
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    for param in launch.kernel.params:
        value = values[param.name]
        if param.is_constexpr or value is None or (type(value) is int and value == 1 and not param.do_not_specialize):
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[param.name], attributes[(param.num,)] = POINTERS[value.dtype], ALIGNED
        elif isinstance(value, int):
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(param.num,)] = ALIGNED
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else ("fp32",) * len(value)
    return signature, constants, attributes


def _accesses(sass: str) -> Counter[tuple[str, int]]:
    counts: Counter[tuple[str, int]] = Counter()
    path, number = "", 0
    for text in sass.splitlines():
        if line := LINE.search(text):
            path, number = line.group(1), int(line.group(2))
        elif access := ACCESS.search(text):
            widths = [NARROW[part] for part in access.group(2).split(".") if part in NARROW]
            counts[_stream(path, number, CALLS[access.group(1)]), widths[-1] if widths else 4] += 1
    return counts


def _stream(path: str, number: int, call: str) -> str:
    """Name of the tensor that a line loads or stores."""
    # A masked load is several lines of inline assembly, each of which counts as a line of the source: look upwards.
    for line in reversed(_source(path)[:number]):
        if found := re.search(rf"tl\.{call}\((\w+)_ptr", line):
            return found.group(1)
    raise ValueError(f"no tl.{call} at or above line {number} of {path}")


@lru_cache
def _source(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _tool(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_path(name), *options, file.name], capture_output=True, text=True, check=True).stdout


def _path(name: str) -> Path:
    return Path(triton.__file__).parent / "backends/nvidia/bin" / name

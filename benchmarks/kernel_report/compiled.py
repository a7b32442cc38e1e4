"""Compile a recorded launch without a GPU: registers, spills, and the width of every access to global memory.

A launch is compiled to a cubin for an architecture, as Triton would on its first call. The assembler reports registers
and spills; `nvdisasm` of Triton's wheel lists the accesses with their source line, which names the tensor.
"""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.launches import Launch

POINTERS = {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
}
ALIGNED = [["tt.divisibility", 16]]
# Loads, stores, and asynchronous copies to shared memory, by which products load operands.
ACCESS = re.compile(r"\b(LDG|STG|LDGSTS)\.(\S+)")
LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
CALLS = {"LDG": "load", "LDGSTS": "load", "STG": "store"}
NARROW = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
INLINE_ASSEMBLY = re.compile(r"// begin inline asm.*?// end inline asm", re.DOTALL)
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w+)")
JUMP = re.compile(r"BRA.*`\((\.L_x_\d+)\)")
BETWEEN = 200  # instructions between those of tensor cores that belong to no loop over products
LOCATION = re.compile(r"^\s*\.loc\s.*$", re.MULTILINE)


class Compiled(NamedTuple):
    """A compiled launch."""

    registers: int  # per thread
    spills: int  # bytes per thread, stored to local memory and loaded from it
    shared: int  # bytes of shared memory per program
    accesses: Counter[tuple[str, int]]  # number of instructions by (tensor, bytes per thread)
    epilogue: int  # instructions behind the loops over products, see `behind_products`

    def vector_share(self, streams: tuple[str, ...]) -> float:
        """Share of the bytes of `streams` in accesses of 16 bytes per thread; ValueError if one is not accessed."""
        found = {name for name, _ in self.accesses}
        if missing := set(streams) - found:
            raise ValueError(f"no accesses to {', '.join(sorted(missing))}, but to {', '.join(sorted(found))}")
        total = sum(n * width for (name, width), n in self.accesses.items() if name in streams)
        wide = sum(n * width for (name, width), n in self.accesses.items() if name in streams and width == 16)
        return wide / total


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile for compute capability `arch` (80, 90)."""
    signature, constants, attributes = specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    knobs, log = triton.knobs, io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), knobs.runtime.scope(), redirect_stdout(log):
        # A cached cubin has old line numbers.
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        knobs.runtime.add_stages_inspection_hook = _exact_lines
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    said = log.getvalue()
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    # Arrays on the stack, such as those of sines, are no spills.
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    sass = _disassemble(compiled.asm["cubin"])
    return Compiled(registers, spills, compiled.metadata.shared, _accesses(sass), behind_products(sass))


def _exact_lines(backend: object = None, stages: dict[str, Callable] | None = None, *_: object) -> tuple[str, str]:
    """Hook of Triton that removes line numbers inside inline assembly, so that the source line's own remain.

    Masked accesses are inline assembly, whose lines LLVM numbers like source lines.
    """
    if stages is not None:
        assemble = stages["cubin"]
        stages["cubin"] = lambda ptx, metadata: assemble(
            INLINE_ASSEMBLY.sub(lambda found: LOCATION.sub("", found.group()), ptx), metadata
        )
    return "exact lines", "exact lines"  # key and hash for Triton's cache


def specialise(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and alignments of a launch, by Triton's rules for call arguments."""
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


def identity(launch: Launch) -> str:
    """A key that is equal for launches that compile to the same code."""
    return repr((launch.kernel.__name__, launch.num_warps, launch.num_stages, specialise(launch)))


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
    line = _source(path)[number - 1]
    if found := re.search(rf"tl\.{call}\((\w+)_(?:ptr|at)\b", line):
        return found.group(1)
    raise ValueError(
        f"{path}:{number} has no tl.{call}(<tensor>_ptr ...) or tl.{call}(<tensor>_at ...): {line.strip()}"
    )


def behind_products(sass: str) -> int:
    """Instructions after the last loop over products, and between loops; 0 without instructions of tensor cores.

    Between two loops they include what starts the second. Every instruction counts once, also those of other loops.
    """
    labels, products, jumps, count = {}, [], [], 0
    for text in sass.splitlines():
        if label := LABEL.match(text):
            labels[label.group(1)] = count
        elif (found := INSTRUCTION.match(text)) and found.group(1) != "NOP":
            if found.group(1) in ("HGMMA", "HMMA"):
                products.append(count)
            elif jump := JUMP.search(text):
                jumps.append((count, jump.group(1)))
            count += 1
    if not products:
        return 0
    last = products[-1]
    ends = [at for at, label in jumps if at > last and labels[label] <= last]
    gaps = [after - before - 1 for before, after in pairwise(products) if after - before > BETWEEN]
    return count - 1 - min(ends, default=last) + sum(gaps)


@lru_cache
def _source(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _disassemble(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--print-line-info", "--print-code", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

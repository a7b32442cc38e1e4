"""Triton code, Inductor's and ours, compiled for an absent GPU.

Inductor generates several configurations of a kernel and drops those that spill registers when it runs. A kernel
counts as spilled if all of them spill.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import triton
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_heuristics

from benchmarks.kernel_report.compiled import compile_launch, identity
from benchmarks.launches import Launch
from fastmum.progress import progress_bar


def spilled_kernels(sources: dict[str, str], launches: Sequence[Launch], arch: int) -> tuple[int, list[str]]:
    """Compile everything.

    Args:
        sources: Inductor's code of a kernel, called `triton_` in it, by name.
        launches: of our own kernels.
        arch: compute capability; Inductor's code already knows its own.

    Returns:
        Number of kernels, and the names of those that spill in every configuration.
    """
    ours = {identity(launch): launch for launch in launches}
    distinct = {hashlib.sha256(code.encode()).hexdigest(): (name, code) for name, code in sources.items()}
    spilled = []
    with progress_bar(total=len(ours) + len(distinct), desc="Triton kernels", unit="kernel", leave=False) as progress:
        for name, code in distinct.values():
            if _spills(code):
                spilled.append(name)
            progress.update()
        for launch in ours.values():
            if compile_launch(launch, arch).spills:
                spilled.append(launch.kernel.__name__)
            progress.update()
    return len(ours) + len(distinct), spilled


def _spills(code: str) -> bool:
    binaries = []
    compile_source = triton.compile

    def keep(*args: object, **kwargs: object) -> object:
        binaries.append(compile_source(*args, **kwargs))
        return binaries[-1]

    autotuner = PyCodeCache.load(code).triton_
    with mock.patch.object(triton_heuristics.triton, "compile", keep):
        for config in autotuner.configs:
            autotuner._precompile_config(config)
            if not _spilled_bytes(binaries[-1].asm["ptx"]):
                return False
    return True


def _spilled_bytes(ptx: str) -> int:
    """Bytes of registers that spill, stores and loads; arrays on the stack, such as those of sines, are no spills."""
    target = re.search(r"^\.target (\w+)", ptx, re.M).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [tool, "--verbose", f"--gpu-name={target}", "--output-file=/dev/null", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", said)))

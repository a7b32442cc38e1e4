"""Memory that is freed on the CPU is kept and reused."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from fastmum.engine.device import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.ones(1 << 24, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(60):
    torch.ones(1 << 26, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_pages_are_reused():
    faults = {}
    for choice in ("keep", "give"):
        command = [sys.executable, "-c", PROGRAM, choice]
        faults[choice] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    pages = (1 << 26) // 4096
    assert faults["give"] > 50 * pages, "glibc returns every tensor by default"
    assert faults["keep"] < 10 * pages

"""Memory that is freed on the CPU is kept and reused."""

import platform
import resource

import pytest
import torch
from processes import FORKSERVER

from fastmum.engine.device import keep_freed_memory

SIZE = 1 << 26


def page_faults(keep):
    assert not keep or keep_freed_memory()
    torch.ones(SIZE // 4, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(60):
        torch.ones(SIZE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_pages_are_reused():
    for keep in (False, True):
        with FORKSERVER.Pool(1) as process:  # in a process that has freed nothing
            pages = process.apply(page_faults, (keep,)) / (SIZE / 4096)
        assert pages < 10 if keep else pages > 50

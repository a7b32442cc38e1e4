"""Planned host functions: calls of one kind repeat the first one's launches on their own data."""

import pytest
import torch
from support import DEVICE

from fastmum.kernels.dispatch import empty, jit, launch, tl
from fastmum.kernels.plans import planned

pytest.importorskip("triton")


@jit(do_not_specialize=["N"])
def _weighted_kernel(x_ptr, y_ptr, out_ptr, N, scale: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + at, mask=at < N, other=0.0)
    if y_ptr is not None:
        value += scale * tl.load(y_ptr + at, mask=at < N, other=0.0)
    tl.store(out_ptr + at, value, mask=at < N)


calls = 0


@planned
def weighted(x, y, scale):
    """x + scale * y, twice, and x * 1."""
    global calls
    calls += 1
    out, other = (empty(x.numel(), dtype=x.dtype, device=x.device) for _ in range(2))
    x = x.contiguous()
    launch(_weighted_kernel, (2,), x, y, out, x.numel(), scale=scale, BLOCK=16, num_warps=1)
    launch(_weighted_kernel, (2,), out, y, other, x.numel(), scale=0, BLOCK=16, num_warps=1)
    return out, None, other


def check(x, y, scale, runs):
    """The result is right, and the function ran so many times."""
    before = calls
    out, nothing, other = weighted(x, y, scale)
    expected = x.flatten() if y is None else x.flatten() + scale * y.flatten()
    assert calls - before == runs
    assert torch.equal(out, expected)
    assert torch.equal(other, expected)
    assert nothing is None
    assert out.data_ptr() != other.data_ptr()
    return out


def test_calls_of_one_kind_repeat_the_first():
    a, b, c, d = (torch.randn(4, 6, device=DEVICE) for _ in range(4))
    kept = check(a, b, 2, runs=1)
    again = check(c, d, 2, runs=0)
    assert kept.data_ptr() != again.data_ptr(), "results have their own memory"
    check(a, None, 2, runs=1)
    check(c, None, 2, runs=0)
    check(a, b, 3, runs=1)
    check(a, b, True, runs=1)  # equal to 1, but of another type
    check(a, b, 1, runs=1)
    check(a[:3], b[:3], 2, runs=1)
    check(c, d, 2, runs=0)


def test_other_calls_are_not_repeated():
    """A tensor twice, memory without alignment, and a copy made on the way."""
    a, b = (torch.randn(5, 5, device=DEVICE) for _ in range(2))
    check(a, a, 2, runs=1)
    check(a, b, 2, runs=1)
    check(a, a, 2, runs=0)
    check(b, a, 2, runs=0)
    memory = torch.randn(2, 26, device=DEVICE)
    for _ in range(2):
        check(memory[0, 1:].view(5, 5), memory[1, 1:].view(5, 5), 2, runs=1)
        check(a.t(), b, 2, runs=1)

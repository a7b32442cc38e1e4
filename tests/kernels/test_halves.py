"""float32 in two halves: exact, and the upper one the nearest bfloat16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import DEVICE

from fastmum.kernels import reference
from fastmum.kernels.adamw import Halves, join, join_bits, split_, split_bits
from fastmum.kernels.dispatch import jit, launch, tl

INFINITY, SIGN = 0x7F800000, -(1 << 31)  # bits


def floats(bits: list[int] | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).to(DEVICE)


def around_every_bfloat16() -> torch.Tensor:
    """Bits of every value that 16 bits hold, of those halfway to the next, and of their neighbours."""
    upper = torch.arange(1 << 16)[:, None] << 16
    lower = torch.tensor([0, 1, 2, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xEDCB, 0xFFFE, 0xFFFF])
    return (upper + lower).flatten() + SIGN


def check(master: torch.Tensor, parameter: torch.Tensor, rest: torch.Tensor, joined: torch.Tensor) -> None:
    number = ~master.isnan()
    assert torch.equal(joined.view(torch.int32)[number], master.view(torch.int32)[number])
    assert joined[~number].isnan().all()
    assert parameter[~number].isnan().all()
    finite = master.isfinite()
    nearest = reference.nearest_bfloat16(master[finite].double())  # whose least unit float32 would flush
    assert torch.equal(parameter.view(torch.int16)[finite], nearest.view(torch.int16))
    assert torch.equal(parameter[number & ~finite], master[number & ~finite].bfloat16())
    tie = rest == -32768
    even = master.to(torch.bfloat16)
    assert torch.equal(parameter[number & ~tie], even[number & ~tie]), "only ties differ from PyTorch"


def halves_of(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    halves = Halves.of(master)
    return *halves, halves.join()


@settings(deadline=None)
@given(st.lists(st.integers(SIGN, -SIGN - 1), min_size=1, max_size=50))
@example([0x00007FFF, 0x00008000, 0x00018000, 0x007FFFFF, 0x00000001])  # subnormal
@example([0x3FFF8000, 0x3FFFFFFF, 0x3F808000, 0x3F818000])  # into the next exponent; ties at even and odd
@example([0x7F7F8000, 0x7F7FFFFF, INFINITY, 0x7FC00000, 0x7FFFFFFF, 0x7F800001])  # the largest, infinite, NaN
@example([SIGN, SIGN | 0x7F7FFFFF, SIGN | INFINITY, -1, -32768, -32769])
def test_any_bits(bits):
    master = floats(bits)
    check(master, *halves_of(master))


def test_around_every_bfloat16():
    master = floats(around_every_bfloat16())
    check(master, *halves_of(master))


def test_the_layout_stays():
    master = torch.randn(2, 3, 4, 4, device=DEVICE).to(memory_format=torch.channels_last)
    halves = Halves.of(master)
    assert halves.parameter.stride() == halves.rest.stride() == halves.join().stride() == master.stride()
    assert torch.equal(halves.join(), master)
    assert (halves.shape, halves.dtype, halves.nbytes) == (master.shape, master.dtype, master.nbytes)


def test_the_master_stays():
    master = torch.randn(100, device=DEVICE)
    before, halves = master.clone(), Halves.of(torch.zeros_like(master))
    halves.fill_(master)
    assert torch.equal(master, before)


@jit()
def _halves_kernel(master_ptr, high_ptr, rest_ptr, joined_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    high, rest = split_bits(tl.load(master_ptr + at, mask=at < N, other=0.0))
    tl.store(high_ptr + at, high, mask=at < N)
    tl.store(rest_ptr + at, rest, mask=at < N)
    tl.store(joined_ptr + at, join_bits(high, rest), mask=at < N)


def test_the_same_bits_in_triton(monkeypatch):
    pytest.importorskip("triton")
    quiet = around_every_bfloat16()
    quiet = quiet[(quiet & 0x7FFFFFFF <= INFINITY) | (quiet & 0x400000 > 0)]  # NaN as arithmetic makes them
    master = floats(quiet)
    high, rest = (torch.empty_like(master, dtype=torch.int16) for _ in range(2))
    joined = torch.empty_like(master)
    launch(
        _halves_kernel, (-(-len(master) // 65536),), master, high, rest, joined, len(master), BLOCK=65536, num_warps=4
    )
    check(master, high.view(torch.bfloat16), rest, joined)
    number = ~master.isnan()
    parameter, plain = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(rest)
    split_(master, parameter, plain)
    assert torch.equal(high[number], parameter.view(torch.int16)[number])
    assert torch.equal(rest[number], plain[number])
    assert torch.equal(join(parameter, plain)[number], joined[number])

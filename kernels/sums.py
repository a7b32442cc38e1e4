"""The second stage of bias gradients: partial sums over rows, which other kernels store, are summed.

The order is fixed, and there are no atomics.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmum.kernels.dispatch import ceil_div, empty, jit, launch, multiprocessors, tl

PROGRAMS_PER_SM = 2  # that sum rows: enough to keep loads in flight, with few partial sums


def row_split(rows: int, rows_at_once: int, device: torch.device) -> tuple[int, int]:
    """Number of programs on `device`, and rows of each, a multiple of `rows_at_once`; the last may have fewer."""
    programs = PROGRAMS_PER_SM * multiprocessors(device)
    share = rows_at_once * max(1, ceil_div(rows, programs * rows_at_once))
    return max(1, ceil_div(rows, share)), share


def finish_sums(partial: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Sum partial sums (n, programs, D) float32 over the programs -> n vectors (D,) of `dtypes`, n at most 3."""
    count, programs, D = partial.shape
    outs = [empty(D, dtype=dtype, device=partial.device) for dtype in dtypes]
    args = partial, outs[0], outs[1 % count], outs[2 % count], programs
    launch(_finish_kernel, (count, ceil_div(D, 64)), *args, D=D, BLOCK_P=64, BLOCK_D=64, num_warps=4)
    return outs


@jit(do_not_specialize=["programs"])
def _finish_kernel(
    partial_ptr,  # (n, programs, D)
    out0_ptr,  # (D,) each; only the first n are written
    out1_ptr, out2_ptr, programs,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        at = (which * programs + p)[:, None] * D + d[None, :]
        total += tl.load(partial_ptr + at, mask=(p < programs)[:, None] & (d < D)[None, :], other=0.0)
    value = tl.sum(total, axis=0)
    if which == 0:
        tl.store(out0_ptr + d, value.to(out0_ptr.dtype.element_ty), mask=d < D)
    elif which == 1:
        tl.store(out1_ptr + d, value.to(out1_ptr.dtype.element_ty), mask=d < D)
    else:
        tl.store(out2_ptr + d, value.to(out2_ptr.dtype.element_ty), mask=d < D)

"""Sums over the rows of a matrix in two stages: the end of every bias gradient.

A kernel that passes over (T, D) values adds up its own rows and stores a partial sum; this one adds the partial sums.
Always in the same order, without atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmum.kernels.dispatch import ceil_div, jit, launch, multiprocessors, tl

PROGRAMS_A_MULTIPROCESSOR = 2  # that add up rows: enough to keep loads in flight, few enough to leave few partial sums


def row_split(rows: int, rows_at_once: int, device: torch.device) -> tuple[int, int]:
    """How programs share rows.

    Args:
        rows: T.
        rows_at_once: that a program loads together.
        device: its multiprocessors decide.

    Returns:
        Number of programs, and rows of each, a multiple of `rows_at_once`; the last may have fewer.
    """
    programs = PROGRAMS_A_MULTIPROCESSOR * multiprocessors(device)
    share = rows_at_once * max(1, ceil_div(rows, programs * rows_at_once))
    return max(1, ceil_div(rows, share)), share


def finish_sums(partial: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Add partial sums.

    Args:
        partial: (n, programs, D) float32, of n sums.
        dtypes: of the n results.

    Returns:
        n vectors (D,).
    """
    count, programs, D = partial.shape
    outs = [torch.empty(D, dtype=dtype, device=partial.device) for dtype in dtypes]
    BLOCK_D = 64
    launch(
        _finish_kernel,
        (count, ceil_div(D, BLOCK_D)),
        *(partial, outs[0], outs[1 % count], outs[2 % count], programs),
        D=D,
        BLOCK_P=64,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
    return outs


@jit(do_not_specialize=["programs"])
def _finish_kernel(
    partial_ptr,  # (n, programs, D)
    out0_ptr,  # (D,) each; those beyond n are not touched
    out1_ptr,
    out2_ptr,
    programs,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
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

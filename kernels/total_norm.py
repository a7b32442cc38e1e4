"""The 2-norm of many tensors together, such as the gradients of a model: one launch per dtype, and a final one.

Squares are summed in float32, chunk by chunk, in a fixed order.

A launch processes many tensors of different sizes by a table of their addresses, int64: for every row of tensors
COLUMNS addresses (the last may be a factor instead, as the bits of a float32); for every row its number of values; for
every chunk its row and its number in the row. A program processes one chunk.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import register_fake

from fastmum.kernels.checks import check_tensors
from fastmum.kernels.dispatch import ceil_div, jit, launch, tl, use_triton
from fastmum.kernels.plans import operator

CHUNK = 1 << 16  # values of a program: 389 M spread evenly, and the table stays small


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The square root of the sum of all squares of dense tensors, a float32 scalar; 0 for an empty list.

    On the CPU the norm of a tensor is rounded to its dtype first. TypeError: a tensor that is not floating point.
    ValueError: tensors on different devices.
    """
    check_tensors(**{f"tensors[{i}]": x for i, x in enumerate(tensors)})
    for i, x in enumerate(tensors):
        if not x.is_floating_point():
            raise TypeError(f"tensors[{i}] has dtype {x.dtype}, but must be floating point")
    return _total_norm(list(tensors)) if tensors else torch.zeros(())


@operator("total_norm")
def _total_norm(tensors: Sequence[Tensor]) -> Tensor:
    alike: dict[torch.dtype, list[Tensor]] = {}
    for x in tensors:
        alike.setdefault(x.dtype, []).append(x)
    if use_triton(tensors[0]):
        return _total_norm_triton(list(alike.values()))
    # A norm in another dtype than the tensors' own is ten times slower on the CPU.
    norms = [torch.stack(torch._foreach_norm(some, 2)).float() for some in alike.values()]
    return torch.linalg.vector_norm(torch.cat(norms))


@register_fake(_total_norm)
def _(tensors):
    return tensors[0].new_empty((), dtype=torch.float32)


def _total_norm_triton(groups: list[list[Tensor]]) -> Tensor:
    device = groups[0][0].device
    tables = [make_table([some]) for some in groups]
    sums = torch.empty(sum(table.chunks for table in tables), dtype=torch.float32, device=device)
    norm, begin = torch.empty((), dtype=torch.float32, device=device), 0
    for some, table in zip(groups, tables, strict=True):
        args = table.words, torch.empty(0, dtype=some[0].dtype, device=device), sums[begin:], table.rows
        constants = {"ALIGN": table.align, "DIVISOR": table.divisor, "CHUNK": CHUNK, "BLOCK": 2048}
        launch(_squares_kernel, (table.chunks,), *args, **constants, num_warps=4)
        begin += table.chunks
    launch(_root_kernel, (1,), sums, norm, len(sums), BLOCK=1024, num_warps=8)
    return norm


class Table(NamedTuple):
    """A table on the device."""

    words: Tensor  # (rows * (columns + 1) + 2 * chunks,) int64
    rows: int
    chunks: int  # of all rows, one program each
    align: int  # divides all addresses, 16 or 2 bytes
    divisor: int  # divides all numbers of values, 16 or 1; with 16 the compiler can mask wide accesses as a whole


def same_order(x: Tensor, y: Tensor) -> bool:
    """Whether tensors of equal shape have equal strides in the dimensions longer than 1; the others mean nothing."""
    strides = zip(x.shape, x.stride(), y.stride(), strict=True)
    return x.stride() == y.stride() or all(size == 1 or one == other for size, one, other in strides)


def check_lists(**lists: tuple[Sequence[Tensor], torch.dtype | None]) -> None:
    """Check lists of tensors for a table, each with its dtype or None for any one dtype; empty `rests` are absent.

    ValueError: lists of different lengths, or a tensor whose shape or strides differ from those of the first list.
    TypeError: another dtype, or several in a list.
    """
    if not lists.get("rests", ((), None))[0]:
        lists.pop("rests", None)
    first = next(iter(lists))
    leaders = lists[first][0]
    for name, (tensors, dtype) in lists.items():
        if len(tensors) != len(leaders):
            raise ValueError(f"{name} has {len(tensors)} tensors, but {first} has {len(leaders)}")
        found = {x.dtype for x in tensors}
        if len(found) > 1:
            raise TypeError(f"{name} has dtypes {sorted(map(str, found))}, but must have one")
        if dtype and found - {dtype}:
            case = f" {'with' if 'rests' in lists else 'without'} rests" if name == "weights" else ""
            raise TypeError(f"{name} has dtype {found.pop()}, but must have {dtype}{case}")
        for x, leader in zip(tensors, leaders, strict=True):
            if x.shape != leader.shape or not same_order(x, leader):
                raise ValueError(
                    f"{name} has a tensor of shape {tuple(x.shape)} and strides {x.stride()}, but that of {first} has "
                    f"{tuple(leader.shape)} and {leader.stride()}"
                )


def make_table(columns: Sequence[Sequence[Tensor]], factors: Sequence[float] | None = None) -> Table:
    """Build the table asynchronously.

    Args:
        columns: lists of dense tensors, whose i-th tensors have equal numbers of values.
        factors: of the rows, the last column.
    """
    first = columns[0]
    device = first[0].device
    chunks = [(i, n) for i, x in enumerate(first) for n in range(ceil_div(x.numel(), CHUNK))]
    rows = [[x.data_ptr() for x in row] for row in zip(*columns, strict=True)]
    align = 16 if all(address % 16 == 0 for row in rows for address in row) else 2
    if factors is not None:
        bits = struct.unpack(f"{len(rows)}i", struct.pack(f"{len(rows)}f", *factors))
        for row, factor in zip(rows, bits, strict=True):
            row.append(factor)
    words = [*chain(*rows), *(x.numel() for x in first), *chain(*chunks)]
    table = torch.tensor(words, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return Table(table, len(first), len(chunks), align, 16 if all(x.numel() % 16 == 0 for x in first) else 1)


@jit()
def chunk_of(table_ptr, rows, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, DIVISOR: tl.constexpr):
    """This program's pointer to the addresses of its row, its first value, and the row's number of values."""
    chunk_ptr = table_ptr + rows * (COLUMNS + 1) + 2 * tl.program_id(0)
    row, number = tl.load(chunk_ptr), tl.load(chunk_ptr + 1)
    numel = tl.multiple_of(tl.load(table_ptr + rows * COLUMNS + row), DIVISOR)
    return table_ptr + row * COLUMNS, number * CHUNK, numel


@jit(do_not_specialize=["rows"])
def _squares_kernel(
    table_ptr,  # see `make_table`: one column
    like_ptr,  # empty, of the tensors' dtype
    sums_ptr,  # (chunks,)
    rows,
    ALIGN: tl.constexpr, DIVISOR: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_ptr, begin, numel = chunk_of(table_ptr, rows, 1, CHUNK, DIVISOR)
    x_ptr = tl.multiple_of(tl.load(row_ptr).to(tl.pointer_type(like_ptr.dtype.element_ty)), ALIGN)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, CHUNK, BLOCK):
        at = begin + first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
        total += x * x
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))


@jit(do_not_specialize=["n"])
def _root_kernel(
    sums_ptr,  # (n,)
    norm_ptr,  # scalar
    n, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + at, mask=at < n, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, axis=0)))

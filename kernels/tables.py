"""Tables of addresses, by which one launch processes many tensors of different sizes.

A table is int64: COLUMNS addresses for every row of tensors, column after column (the last may be a factor instead, as
the bits of a float32); for every row its number of values; for every chunk its row and its number in the row. A program
processes one chunk.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import reduce
from itertools import chain
from operator import methodcaller, or_
from typing import NamedTuple

import torch
from torch import Tensor

from fastmum.kernels.dispatch import ceil_div, jit, tl

_address = methodcaller("data_ptr")  # a loop in C, for what runs at every step
CHUNK = 1 << 16  # values of a program: 389 M spread evenly, and the table stays small


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


def is_plain(x: Tensor) -> bool:
    """Whether `x` has memory, unlike fake tensors and those of distributed wrappers."""
    return type(x) is Tensor or type(x) is torch.nn.Parameter


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    """Where the memory of every tensor begins."""
    return [*map(_address, tensors)]


def make_table(columns: Sequence[Sequence[Tensor]], factors: Sequence[float] | None = None) -> Table:
    """Build the table asynchronously.

    Args:
        columns: lists of dense tensors, whose i-th tensors have equal numbers of values.
        factors: of the rows, the last column.
    """
    first = columns[0]
    device, numels = first[0].device, [x.numel() for x in first]
    chunks = [(i, n) for i, numel in enumerate(numels) for n in range(ceil_div(numel, CHUNK))]
    addresses = [addresses_of(column) for column in columns]
    align = 16 if reduce(or_, chain(*addresses)) % 16 == 0 else 2
    if factors is not None:
        addresses.append([*struct.unpack(f"{len(first)}i", struct.pack(f"{len(first)}f", *factors))])
    words = _words([*chain(*addresses), *numels, *chain(*chunks)], device).to(device, non_blocking=True)
    return Table(words, len(first), len(chunks), align, 16 if reduce(or_, numels) % 16 == 0 else 1)


class KeptTable:
    """A table for many calls: of columns that stay where they are, and one of tensors that may move between calls.

    Args:
        before, after: the columns that stay, left and right of the one that moves.
    """

    def __init__(self, before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> None:
        self._before, self._after = before, after
        self._addresses: list[int] = []
        self._table: Table | None = None

    def of(self, moving: Sequence[Tensor], addresses: list[int]) -> Table:
        """The table with the column `moving`, whose addresses are given; copies nothing if they are the last ones."""
        table = self._table
        if table is None or table.align < 16 or reduce(or_, addresses) % 16:
            table = make_table((*self._before, moving, *self._after))
        elif addresses != self._addresses:
            start = len(self._before) * table.rows
            column = table.words[start : start + table.rows]
            column.copy_(_words(addresses, column.device), non_blocking=True)
        self._table, self._addresses = table, addresses
        return table


def _words(words: list[int], device: torch.device) -> Tensor:
    """On the host, for an asynchronous copy to `device`."""
    return torch.tensor(words, dtype=torch.int64, pin_memory=device.type == "cuda")


@jit()
def chunk_of(table_ptr, rows, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, DIVISOR: tl.constexpr):
    """This program's pointer to the first address of its row, its first value, and the row's number of values.

    The other addresses of the row follow at multiples of `rows`.
    """
    chunk_ptr = table_ptr + rows * (COLUMNS + 1) + 2 * tl.program_id(0)
    row, number = tl.load(chunk_ptr), tl.load(chunk_ptr + 1)
    numel = tl.multiple_of(tl.load(table_ptr + rows * COLUMNS + row), DIVISOR)
    return table_ptr + row, number * CHUNK, numel

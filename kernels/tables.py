"""Many tensors of different sizes in one launch, by a table of their addresses.

The table is int64: for every row of tensors COLUMNS addresses; for every row its number of values; for every chunk its
row and its number in the row. A program processes one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmum.kernels.dispatch import ceil_div, jit, tl

CHUNK = 1 << 16  # values of a program: 389 M spread evenly, and the table stays small


class Table(NamedTuple):
    """A table on the device."""

    words: Tensor  # (rows * (columns + 1) + 2 * chunks,) int64
    rows: int
    chunks: int  # of all rows, one program each
    align: int  # divides all addresses, 16 or 2 bytes
    divisor: int  # divides all numbers of values, 16 or 1; with 16 the compiler can mask wide accesses as a whole


def make_table(columns: Sequence[Sequence[Tensor]]) -> Table:
    """Build the table of lists of dense tensors, whose i-th tensors have equal numbers of values; asynchronously."""
    first = columns[0]
    device = first[0].device
    chunks = [(i, n) for i, x in enumerate(first) for n in range(ceil_div(x.numel(), CHUNK))]
    addresses = [x.data_ptr() for row in zip(*columns, strict=True) for x in row]
    words = addresses + [x.numel() for x in first] + [word for chunk in chunks for word in chunk]
    table = torch.tensor(words, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    align = 16 if all(address % 16 == 0 for address in addresses) else 2
    return Table(table, len(first), len(chunks), align, 16 if all(x.numel() % 16 == 0 for x in first) else 1)


@jit()
def chunk_of(table_ptr, rows, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, DIVISOR: tl.constexpr):
    """This program's pointer to the addresses of its row, its first value, and the row's number of values."""
    chunk_ptr = table_ptr + rows * (COLUMNS + 1) + 2 * tl.program_id(0)
    row, number = tl.load(chunk_ptr), tl.load(chunk_ptr + 1)
    numel = tl.multiple_of(tl.load(table_ptr + rows * COLUMNS + row), DIVISOR)
    return table_ptr + row * COLUMNS, number * CHUNK, numel

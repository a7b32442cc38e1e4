"""Many tensors of different sizes in one launch: a table of where they lie, made on the host.

The table is int64: COLUMNS addresses of every row of tensors; the number of values of every row; and of every chunk its
row and its number within it. A program works on one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmum.kernels.dispatch import ceil_div, jit, tl

CHUNK = 1 << 16  # values of a program: few enough that 389 M spread evenly, many enough that the table stays small


class Table(NamedTuple):
    """A table on the device.

    Args:
        words: (rows * (columns + 1) + 2 * chunks,) int64.
        rows: of tensors.
        chunks: of all rows: programs to launch.
        align: bytes that divide all addresses, 16 or 2.
        divisor: 16 where it divides the number of values of every row, else 1: without it the compiler cannot know that
            the values of a wide access are all inside or all outside, and makes them one by one.
    """

    words: Tensor
    rows: int
    chunks: int
    align: int
    divisor: int


def make_table(columns: Sequence[Sequence[Tensor]]) -> Table:
    """Write down where tensors lie, in one small copy to the device that the host does not wait for.

    Args:
        columns: lists of tensors without gaps, of which those in the same place have as many values.
    """
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
    """Of this program: where the addresses of its row are, its first value, and the row's number of values."""
    chunk_ptr = table_ptr + rows * (COLUMNS + 1) + 2 * tl.program_id(0)
    row, number = tl.load(chunk_ptr), tl.load(chunk_ptr + 1)
    numel = tl.multiple_of(tl.load(table_ptr + rows * COLUMNS + row), DIVISOR)
    return table_ptr + row * COLUMNS, number * CHUNK, numel

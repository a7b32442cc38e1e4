"""The 2-norm of many tensors together, such as the gradients of a model: one launch per dtype, and a final one.

Squares are summed in float32, chunk by chunk, in a fixed order.

A launch processes many tensors of different sizes by a table of their addresses, see `tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter, methodcaller

import torch
from torch import Tensor
from torch.library import register_fake

from fastmum.kernels.checks import check_tensors
from fastmum.kernels.dispatch import jit, launch, tl, use_triton
from fastmum.kernels.plans import chooser, operator
from fastmum.kernels.tables import CHUNK, KeptTable, Table, addresses_of, chunk_of, is_plain, make_table

_numel, _dtype = methodcaller("numel"), attrgetter("dtype")


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The square root of the sum of all squares of dense tensors, a float32 scalar; 0 for an empty list.

    On the CPU the norm of a tensor is rounded to its dtype first. TypeError: a tensor that is not floating point.
    ValueError: tensors on different devices.
    """
    check_norm(tensors)
    return _total_norm(list(tensors)) if tensors else torch.zeros(())


def check_norm(tensors: Sequence[Tensor]) -> None:
    """Check the argument of `total_norm`."""
    check_tensors(**{f"tensors[{i}]": x for i, x in enumerate(tensors)})
    for i, x in enumerate(tensors):
        if not x.is_floating_point():
            raise TypeError(f"tensors[{i}] has dtype {x.dtype}, but must be floating point")


@operator("total_norm")
def _total_norm(tensors: Sequence[Tensor]) -> Tensor:
    groups = _by_dtype(tensors)
    if use_triton(tensors[0]):
        return _total_norm_triton(groups)
    # A norm in another dtype than the tensors' own is ten times slower on the CPU.
    norms = [torch.stack(torch._foreach_norm(some, 2)).float() for some in groups]
    return torch.linalg.vector_norm(torch.cat(norms))


@register_fake(_total_norm)
def _(tensors):
    return tensors[0].new_empty((), dtype=torch.float32)


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    alike: dict[torch.dtype, list[Tensor]] = {}
    for x in tensors:
        alike.setdefault(x.dtype, []).append(x)
    return list(alike.values())


def _total_norm_triton(groups: list[list[Tensor]]) -> Tensor:
    device = groups[0][0].device
    return _launch([(make_table([some]), torch.empty(0, dtype=some[0].dtype, device=device)) for some in groups])


def _launch(groups: Sequence[tuple[Table, Tensor]]) -> Tensor:
    device = groups[0][1].device
    sums = torch.empty(sum(table.chunks for table, _ in groups), dtype=torch.float32, device=device)
    norm, begin = torch.empty((), dtype=torch.float32, device=device), 0
    for table, typed in groups:
        args = table.words, typed, sums[begin:], table.rows
        constants = {"ALIGN": table.align, "DIVISOR": table.divisor, "CHUNK": CHUNK, "BLOCK": 2048}
        launch(_squares_kernel, (table.chunks,), *args, **constants, num_warps=4)
        begin += table.chunks
    launch(_root_kernel, (1,), sums, norm, len(sums), BLOCK=1024, num_warps=8)
    return norm


class Norm:
    """`total_norm` of tensors that are of the same kinds at every call, whose tables are kept."""

    def __init__(self) -> None:
        self._kinds: tuple[list, list] = [], []
        self._groups: list[tuple[Callable, KeptTable, Tensor]] = []

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """The norm; argument and errors as of `total_norm`."""
        if not tensors or not is_plain(tensors[0]) or not use_triton(tensors[0]):
            return total_norm(tensors)
        kinds = [*map(_numel, tensors)], [*map(_dtype, tensors)]
        if kinds != self._kinds:
            check_norm(tensors)
            numbers: dict[torch.dtype, list[int]] = {}
            for i, x in enumerate(tensors):
                numbers.setdefault(x.dtype, []).append(i)
            empty = partial(torch.empty, 0, device=tensors[0].device)
            self._groups = [(chooser(some), KeptTable([], []), empty(dtype=dtype)) for dtype, some in numbers.items()]
            self._kinds = kinds
        addresses, tables = addresses_of(tensors), []
        for choose, kept, typed in self._groups:
            tables.append((kept.of(choose(tensors), [*choose(addresses)]), typed))
        return _launch(tables)


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

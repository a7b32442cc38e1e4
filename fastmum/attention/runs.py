"""Neighbouring spans of equal lengths, which one product or one call computes together.

Legend: n spans, L tokens of a span, h heads, d width of a head, T tokens in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from fastmum.attention.opaque import Pair


class Run(NamedTuple):
    """Neighbouring spans of equal lengths.

    Args:
        count: n of them.
        queries, keys: their tokens.
    """

    count: int
    queries: slice
    keys: slice


def runs(pairs: list[Pair]) -> Iterator[Run]:
    """Spans as few runs as can be, in their order."""
    start = 0
    for i in range(1, len(pairs) + 1):
        if i == len(pairs) or not _continues(pairs[i - 1], pairs[i]):
            queries, keys = (slice(a.start, b.stop) for a, b in zip(pairs[start], pairs[i - 1], strict=True))
            yield Run(i - start, queries, keys)
            start = i


def by_head(x: Tensor, place: slice, count: int) -> Tensor:
    """Tokens of `count` spans of packed ones (T, h, d), as a view (n, h, L, d)."""
    return x[place].unflatten(0, (count, -1)).transpose(1, 2)


def _continues(a: Pair, b: Pair) -> bool:
    """Whether b begins where a ends and is as long."""
    return all(x.stop == y.start and x.stop - x.start == y.stop - y.start for x, y in zip(a, b, strict=True))

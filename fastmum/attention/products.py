"""Attention by explicit matrix products, in pieces whose scores stay in the cache.

torch's CPU attention takes two to seven times its forward pass for the backward pass, more the shorter the spans. Here
everything is a oneDNN product. Scores and their gradients are products of bfloat16 operands with float32 results
(`fp32_precision = "bf16"` on operands that hold bfloat16 values, so nothing is lost); only probabilities and gradients
of scores are rounded to bfloat16, for the products that follow. docs/LOG.md has the figures.

Legend: B (span, head) pairs of equal lengths; Lq, Lk tokens of a span; d width of a head; P probabilities; S scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from fastmum.attention.opaque import Pair
from fastmum.attention.runs import by_head, runs
from fastmum.kernels.matmul import product

PIECE = 1 << 20  # scores computed at once, 4 MB in float32: whole heads while they fit,
PIECE_OF_HEAD = 1 << 22  # and of a head that is larger, as many queries as these


def forward(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair]) -> Tensor:
    """softmax(q k' / sqrt(d)) v within every span; see `opaque_attention`."""
    out = q.new_zeros(q.shape)  # queries of a span without keys stay 0
    with _products(q):
        for run in runs(pairs):
            n, queries, keys = run
            q_BLd, k_BLd, v_BLd = _heads(q, queries, n), _heads(k, keys, n), _heads(v, keys, n)
            o_BLd = torch.empty_like(q_BLd)
            for heads, rows in _pieces(q_BLd, k_BLd):
                P = _probabilities(q_BLd[heads, rows], k_BLd[heads])
                # The largest probability of a row becomes 1, which rounding leaves alone.
                largest = P.amax(-1, keepdim=True)
                o = torch.bmm(P.div_(largest), _wide(v_BLd[heads]))
                torch.mul(o, largest, out=o_BLd[heads, rows])
            _put(out, queries, n, o_BLd)
    return out


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; probabilities are computed again."""
    # Queries of a span without keys, and keys that nobody sees, get none.
    grads = tuple(x.new_zeros(x.shape) for x in (q, k, v))
    before, after = _scales(q.shape[-1])
    with _products(q):
        for run in runs(pairs):
            n, queries, keys = run
            q_BLd, k_BLd, v_BLd = _heads(q, queries, n), _heads(k, keys, n), _heads(v, keys, n)
            g_BLd, dq_BLd = _heads(grad, queries, n), torch.empty_like(q_BLd)
            dk_BLd, dv_BLd = (x.new_zeros(x.shape, dtype=_wide_type(x)) for x in (k_BLd, v_BLd))
            for heads, rows in _pieces(q_BLd, k_BLd):
                q_bld, g_bld, k_bld = q_BLd[heads, rows], g_BLd[heads, rows], k_BLd[heads]
                P = _probabilities(q_bld, k_bld)
                dv_BLd[heads] += product(P.to(v.dtype).mT, g_bld)
                dP = torch.bmm(_wide(g_bld).mul(before), _wide(v_BLd[heads]).mT)
                dS = torch.ops.aten._softmax_backward_data.out(dP, P, -1, P.dtype, grad_input=dP)
                dS = dS.to(q.dtype) if after == 1.0 else dS.mul_(after).to(q.dtype)
                dq_BLd[heads, rows] = product(dS, k_bld)
                dk_BLd[heads] += product(dS.mT, q_bld)
            for out, place, value in zip(grads, (queries, keys, keys), (dq_BLd, dk_BLd, dv_BLd), strict=True):
                _put(out, place, n, value)
    return grads


def _probabilities(q_bld: Tensor, k_bld: Tensor) -> Tensor:
    """Softmax over keys, in float32 at least."""
    before, after = _scales(q_bld.shape[-1])
    S = torch.bmm(_wide(q_bld).mul(before), _wide(k_bld).mT)
    if after != 1.0:
        S.mul_(after)
    return torch.softmax(S, -1, out=S)


def _scales(width: int) -> tuple[float, float]:
    """1 / sqrt(d) as a power of two, which no bfloat16 value is rounded by, and what is left for the scores."""
    scale = width**-0.5
    before = 2.0 ** math.floor(math.log2(scale))
    return before, scale / before


def _heads(x: Tensor, place: slice, count: int) -> Tensor:
    """Tokens of `count` spans (n*L, h, d) as (n*h, L, d), contiguous."""
    return by_head(x, place, count).reshape(-1, (place.stop - place.start) // count, x.shape[-1])


def _put(out: Tensor, place: slice, count: int, x_BLd: Tensor) -> None:
    """The way back of `_heads`."""
    view = by_head(out, place, count)
    view.copy_(x_BLd.view(view.shape))


@contextmanager
def _products_of_bfloat16() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _products(x: Tensor) -> AbstractContextManager[None]:
    return _products_of_bfloat16() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else nullcontext()


def _wide_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_type(x), memory_format=torch.contiguous_format)


def _pieces(q_BLd: Tensor, k_BLd: Tensor) -> Iterator[tuple[slice, slice]]:
    """Heads and rows of queries to be computed at once."""
    B, Lq, Lk = *q_BLd.shape[:2], k_BLd.shape[1]
    heads = max(1, PIECE // (Lq * Lk))
    rows = Lq if Lq * Lk <= PIECE_OF_HEAD else max(1, PIECE_OF_HEAD // Lk)
    for head in range(0, B, heads):
        for row in range(0, Lq, rows):
            yield slice(head, head + heads), slice(row, row + rows)

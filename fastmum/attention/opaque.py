"""Attention as an operator that the compiler does not look into.

Lengths are read on the CPU, inside the operator, where they vary from batch to batch without a graph break, a
recompilation or a wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """A span of queries and the span of keys that it sees, as slices of the packed tokens."""

    queries: slice
    keys: slice


Forward = Callable[[Tensor, Tensor, Tensor, list[Pair]], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, list[Pair]], tuple[Tensor, Tensor, Tensor]]


def opaque_attention(
    name: str, forward: Forward, backward: Backward
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Register `fastmum::<name>` (q, k, v, cu_q, cu_k) -> out and its gradient.

    Args:
        name: of the operator.
        forward: q (T_q, h, d), k, v (T_k, h, d) and pairs of spans that are not empty -> (T_q, h, d), contiguous.
        backward: gradient of the output, q, k, v, pairs -> gradients of q, k and v, contiguous.

    Returns:
        The operator; cu_q and cu_k are (n + 1,) int32 on the CPU.
    """

    @torch.library.custom_op(f"fastmum::{name}", mutates_args=())
    def operator(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return forward(q, k, v, _pairs(cu_q, cu_k, len(q), len(k)))

    @operator.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        return _like(q)

    @torch.library.custom_op(f"fastmum::{name}_backward", mutates_args=())
    def operator_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            return backward(grad, q, k, v, _pairs(cu_q, cu_k, len(q), len(k)))

    @operator_backward.register_fake
    def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _like(q), _like(k), _like(v)

    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *operator_backward(grad, *ctx.saved_tensors), None, None

    operator.register_autograd(differentiate, setup_context=setup_context)
    return operator


def _pairs(cu_q: Tensor, cu_k: Tensor, queries: int, keys: int) -> list[Pair]:
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    if (ends_q[-1], ends_k[-1]) != (queries, keys):
        raise ValueError(f"spans end at {ends_q[-1]} and {ends_k[-1]}, but there are {queries} queries and {keys} keys")
    pairs = zip(pairwise(ends_q), pairwise(ends_k), strict=True)
    return [Pair(slice(*q), slice(*k)) for q, k in pairs if q[1] > q[0] and k[1] > k[0]]


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)

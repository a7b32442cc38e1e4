"""xformers, with its mask of blocks on the diagonal."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmum.attention.backend import Backend
from fastmum.attention.opaque import Pair, opaque_attention
from fastmum.attention.spans import Spans

if TYPE_CHECKING:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask


def _forward(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair]) -> Tensor:
    from xformers.ops import memory_efficient_attention_forward

    out = memory_efficient_attention_forward(q[None], k[None], v[None], attn_bias=_mask(pairs, q, k))
    return out[0].contiguous()


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    from xformers.ops import memory_efficient_attention_backward, memory_efficient_attention_forward_requires_grad

    mask = _mask(pairs, q, k)
    inputs = q[None], k[None], v[None]
    # The shape of the log-sum-exp depends on the lengths, so it cannot be handed on: it is computed again.
    out, lse = memory_efficient_attention_forward_requires_grad(*inputs, attn_bias=mask)
    grads = memory_efficient_attention_backward(grad[None], out, lse, *inputs, attn_bias=mask)
    return tuple(x[0].contiguous() for x in grads)


def _mask(pairs: list[Pair], q: Tensor, k: Tensor) -> BlockDiagonalMask:
    queries, keys = (tuple(span.stop - span.start for span in spans) for spans in zip(*pairs, strict=True))
    if (sum(queries), sum(keys)) != (len(q), len(k)):  # blocks lie one behind another, so it would take wrong tokens
        raise ValueError("xformers needs keys for every span of queries and queries for every span of keys; use 'sdpa'")
    return _mask_of_lengths(queries, keys, q.device)


@lru_cache(maxsize=4)  # of a batch there are two: all queries, and the masked ones of the last block
def _mask_of_lengths(queries: tuple[int, ...], keys: tuple[int, ...], device: torch.device) -> BlockDiagonalMask:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(list(queries), list(keys), device=device)


# Masks hold Python lists that differ from batch to batch, which compiled code must not see.
xformers_attention = opaque_attention("xformers_attention", _forward, _backward)


class Xformers(Backend):
    """`xformers.ops.memory_efficient_attention`; the backward pass computes the forward pass once more."""

    name = "xformers"
    package = "xformers"
    install = "pip install 'fastmum[xformers]'"

    def plan(self, spans: Spans, device: torch.device) -> Spans:
        return spans.to(torch.device("cpu"))  # it takes lists of lengths

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Spans) -> Tensor:
        return xformers_attention(q, k, v, plan.cu_q, plan.cu_k)

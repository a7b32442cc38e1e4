"""Dense attention for groups of equal segments: torch's SDPA; in bfloat16 on the CPU explicit matrix products.

torch's CPU attention takes two to seven times its forward time for the backward pass (docs/LOG.md, 2026-11-23). Here
that is oneDNN products in blocks whose scores stay in the cache. Scores and their gradients are products of bfloat16
values with float32 results (`fp32_precision = "bf16"`); probabilities and gradients of scores are rounded to bfloat16.

Legend: B (segment, head) pairs of a group; Lq, Lk tokens of a segment; d width of a head; P probabilities; S scores.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.attention.backend import Backend, Group, Segments, attention_operator
from fastmum.kernels.matmul import product

BLOCK_SCORES = 1 << 20  # scores computed at once, 4 MB in float32: whole heads, as many as fit
HEAD_SCORES = 1 << 22  # a head with more scores is computed in blocks of queries of at most this size


def uses_products(q: Tensor) -> bool:
    """Whether explicit products are faster than SDPA: in bfloat16 on the CPU."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


def has_fused_backward(q: Tensor) -> bool:
    """Whether torch's memory-efficient kernel computes gradients: on CUDA, in up to float32."""
    return q.is_cuda and q.dtype != torch.float64 and q.shape[-1] % 8 == 0


def dense_attention(q: Tensor, k: Tensor, v: Tensor, seqlen: int) -> Tensor:
    """Attention within segments of equal length; q, k, v (T, h, d) of any strides -> (T, h, d), contiguous."""
    if seqlen < 1 or len(q) % seqlen:
        raise ValueError(f"seqlen is {seqlen}, but must divide the number of tokens, {len(q)}")
    if uses_products(q):
        cu_seqlens = torch.arange(0, len(q) + 1, seqlen, dtype=torch.int32)
        return segment_attention(q, k, v, cu_seqlens, cu_seqlens)
    q, k, v = (x.unflatten(0, (-1, seqlen)).transpose(1, 2) for x in (q, k, v))  # (n, h, L, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


class Sdpa(Backend):
    """Dense attention per group of equal segments; runs everywhere, the default on the CPU."""

    name = "sdpa"

    def why_not(self, device: torch.device) -> str | None:
        return None

    def plan(self, segments: Segments, device: torch.device) -> Segments:
        return segments.to(torch.device("cpu"))  # the operator reads the lengths

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Segments) -> Tensor:
        return segment_attention(q, k, v, plan.cu_seqlens_q, plan.cu_seqlens_k)


def _forward(q: Tensor, k: Tensor, v: Tensor, groups: list[Group]) -> Tensor:
    attend = _by_products if uses_products(q) else F.scaled_dot_product_attention
    # SDPA takes another kernel, with other rounding, where the last axis has a stride.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if len(groups) == 1 and groups[0].n * groups[0].Lq == len(q):
        o_nhLd = attend(groups[0].queries(q), groups[0].keys(k), groups[0].keys(v))
        return o_nhLd.transpose(1, 2).flatten(0, 1).contiguous()
    out = q.new_zeros(q.shape)  # queries of a segment without keys stay 0
    for group in groups:
        group.queries(out).copy_(attend(group.queries(q), group.keys(k), group.keys(v)))
    return out


def _by_products(q_nhLd: Tensor, k_nhLd: Tensor, v_nhLd: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v."""
    q_BLd, k_BLd, v_BLd = (x.reshape(-1, *x.shape[2:]) for x in (q_nhLd, k_nhLd, v_nhLd))
    o_BLd = torch.empty_like(q_BLd)
    with _bfloat16_products(q_BLd):
        for heads, rows in _blocks(q_BLd, k_BLd):
            P = _probabilities(q_BLd[heads, rows], k_BLd[heads])
            # Scale the largest probability of a row to 1, which rounding does not change.
            largest = P.amax(-1, keepdim=True)
            o = torch.bmm(P.div_(largest), _wide(v_BLd[heads]))
            torch.mul(o, largest, out=o_BLd[heads, rows])
    return o_BLd.view(q_nhLd.shape)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, groups: list[Group]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from recomputed probabilities; 0 for queries without keys and keys without queries."""
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    if has_fused_backward(q):
        _backward_by_sdpa(grad, q, k, v, groups, (dq, dk, dv))
        return dq, dk, dv
    before, after = _scales(q.shape[-1])
    with _bfloat16_products(q):
        for group in groups:
            views = group.queries(q), group.queries(grad), group.keys(k), group.keys(v)
            q_BLd, g_BLd, k_BLd, v_BLd = (x.reshape(-1, *x.shape[2:]) for x in views)
            dq_BLd, wide = torch.empty_like(q_BLd), torch.promote_types(q.dtype, torch.float32)
            dk_BLd, dv_BLd = (x.new_zeros(x.shape, dtype=wide) for x in (k_BLd, v_BLd))
            for heads, rows in _blocks(q_BLd, k_BLd):
                q_bld, g_bld, k_bld = q_BLd[heads, rows], g_BLd[heads, rows], k_BLd[heads]
                P = _probabilities(q_bld, k_bld)
                dv_BLd[heads] += product(P.to(v.dtype).mT, g_bld)
                dP = torch.bmm(_wide(g_bld).mul(before), _wide(v_BLd[heads]).mT)
                dS = torch.ops.aten._softmax_backward_data.out(dP, P, -1, P.dtype, grad_input=dP)
                dS = dS.to(q.dtype) if after == 1.0 else dS.mul_(after).to(q.dtype)
                dq_BLd[heads, rows] = product(dS, k_bld)
                dk_BLd[heads] += product(dS.mT, q_bld)
            outs = group.queries(dq), group.keys(dk), group.keys(dv)
            for out, x_BLd in zip(outs, (dq_BLd, dk_BLd, dv_BLd), strict=True):
                out.copy_(x_BLd.view(out.shape))
    return dq, dk, dv


def _backward_by_sdpa(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, groups: list[Group], outs: tuple[Tensor, Tensor, Tensor]
) -> None:
    """The same, into `outs`, by two kernels a group: the log-sum-exp is computed again, as its shape varies."""
    aten = torch.ops.aten
    grad, q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad, q, k, v))
    for group in groups:
        inputs = group.queries(q), group.keys(k), group.keys(v)
        saved = aten._scaled_dot_product_efficient_attention(*inputs, None, True)
        rest = *inputs, None, *saved, 0.0, [True, True, True, False]
        grads = aten._scaled_dot_product_efficient_attention_backward(group.queries(grad), *rest)
        views = group.queries(outs[0]), group.keys(outs[1]), group.keys(outs[2])
        for view, part in zip(views, grads, strict=False):
            view.copy_(part)


segment_attention = attention_operator("segment_attention", _forward, _backward)


def _probabilities(q_bld: Tensor, k_bld: Tensor) -> Tensor:
    """Softmax over keys, in float32 at least."""
    before, after = _scales(q_bld.shape[-1])
    S = torch.bmm(_wide(q_bld).mul(before), _wide(k_bld).mT)
    if after != 1.0:
        S.mul_(after)
    return torch.softmax(S, -1, out=S)


def _scales(width: int) -> tuple[float, float]:
    """1 / sqrt(d) as a power of two, exact in bfloat16, and the remaining factor of the scores."""
    scale = width**-0.5
    before = 2.0 ** math.floor(math.log2(scale))
    return before, scale / before


@contextmanager
def _bfloat16_products(x: Tensor) -> Iterator[None]:
    """If `x` is bfloat16 on the CPU, multiply float32 operands as bfloat16 values with float32 results."""
    if not uses_products(x):
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _wide(x: Tensor) -> Tensor:
    """In float32 at least, contiguous."""
    return x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)


def _blocks(q_BLd: Tensor, k_BLd: Tensor) -> Iterator[tuple[slice, slice]]:
    """Heads, and rows of queries, that are computed at once."""
    B, Lq, Lk = *q_BLd.shape[:2], k_BLd.shape[1]
    heads = max(1, BLOCK_SCORES // (Lq * Lk))
    rows = Lq if Lq * Lk <= HEAD_SCORES else max(1, HEAD_SCORES // Lk)
    for head in range(0, B, heads):
        for row in range(0, Lq, rows):
            yield slice(head, head + heads), slice(row, row + rows)

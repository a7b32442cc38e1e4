"""torch's dense attention for neighbouring spans of the same length; in bfloat16 on the CPU explicit products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.attention import products
from fastmum.attention.backend import Backend
from fastmum.attention.opaque import Pair, opaque_attention
from fastmum.attention.runs import by_head, runs
from fastmum.attention.spans import Spans


def _dense(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair]) -> Tensor:
    """One call of SDPA, on views, for neighbouring spans of the same lengths."""
    # Of features that do not lie side by side SDPA takes another way, whose last bits differ.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    parts = []
    for count, queries, keys in runs(pairs):
        q_nhLd, k_nhLd, v_nhLd = by_head(q, queries, count), by_head(k, keys, count), by_head(v, keys, count)
        o_Thd = F.scaled_dot_product_attention(q_nhLd, k_nhLd, v_nhLd).transpose(1, 2).flatten(0, 1)
        if len(o_Thd) == len(q):
            return o_Thd.contiguous()
        parts.append((queries, o_Thd))
    out = q.new_zeros(q.shape)  # queries of a span without keys stay 0
    for queries, o_Thd in parts:
        out[queries] = o_Thd
    return out


def by_products(q: Tensor) -> bool:
    """Whether explicit products are the faster way: in bfloat16 on the CPU (docs/LOG.md, 2026-11-23)."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


def _forward(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair]) -> Tensor:
    return (products.forward if by_products(q) else _dense)(q, k, v, pairs)


attention_by_spans = opaque_attention("attention_by_spans", _forward, products.backward)


class Sdpa(Backend):
    """Dense attention for neighbouring spans of the same length; runs everywhere, the default on the CPU."""

    name = "sdpa"

    def why_not(self, device: torch.device) -> str | None:
        return None

    def plan(self, spans: Spans, device: torch.device) -> Spans:
        return spans.to(torch.device("cpu"))  # it reads the lengths

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Spans) -> Tensor:
        return attention_by_spans(q, k, v, plan.cu_q, plan.cu_k)

"""torch's dense attention for all spans of the same length at once; in bfloat16 on the CPU explicit products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.attention import products
from fastmum.attention.backend import Backend
from fastmum.attention.opaque import Pair, opaque_attention
from fastmum.attention.spans import Spans


def _buckets(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair]) -> Tensor:
    """One call of SDPA for all spans of the same lengths."""
    buckets: dict[tuple[int, int], list[Pair]] = {}
    for pair in pairs:
        lengths = tuple(span.stop - span.start for span in pair)
        buckets.setdefault(lengths, []).append(pair)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)  # queries of a span without keys stay 0
    for bucket in buckets.values():
        q_nhLd = torch.stack([q[pair.queries] for pair in bucket]).transpose(1, 2)
        k_nhLd, v_nhLd = (torch.stack([x[pair.keys] for pair in bucket]).transpose(1, 2) for x in (k, v))
        o_nLhd = F.scaled_dot_product_attention(q_nhLd, k_nhLd, v_nhLd).transpose(1, 2)
        for pair, o_Lhd in zip(bucket, o_nLhd, strict=True):
            out[pair.queries] = o_Lhd
    return out


def by_products(q: Tensor) -> bool:
    """Whether explicit products are the faster way: in bfloat16 on the CPU (docs/LOG.md, 2026-11-23)."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


def _forward(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair]) -> Tensor:
    return (products.forward if by_products(q) else _buckets)(q, k, v, pairs)


attention_by_spans = opaque_attention("attention_by_spans", _forward, products.backward)


class Sdpa(Backend):
    """Dense attention for all spans of the same length at once; runs everywhere, the default on the CPU."""

    name = "sdpa"

    def why_not(self, device: torch.device) -> str | None:
        return None

    def plan(self, spans: Spans, device: torch.device) -> Spans:
        return spans.to(torch.device("cpu"))  # it reads the lengths

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Spans) -> Tensor:
        return attention_by_spans(q, k, v, plan.cu_q, plan.cu_k)

"""Attention within spans of equal length: a frame's tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.attention.sdpa import attention_by_spans, by_products


def dense_attention(q: Tensor, k: Tensor, v: Tensor, span: int) -> Tensor:
    """Attention within spans of equal length.

    Args:
        q, k, v: (T, h, d), any strides.
        span: L, dividing T; tokens [i*L, (i+1)*L) see each other and nothing else.

    Returns:
        (T, h, d), contiguous.

    Raises:
        ValueError: a span that does not divide T.
    """
    if span < 1 or len(q) % span:
        raise ValueError(f"span is {span}, but must divide the number of tokens, {len(q)}")
    if by_products(q):
        ends = torch.arange(0, len(q) + 1, span, dtype=torch.int32)
        return attention_by_spans(q, k, v, ends, ends)
    q, k, v = (x.unflatten(0, (-1, span)).transpose(1, 2) for x in (q, k, v))  # (n, h, L, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

"""Attention over packed tokens: equal spans (a frame) and spans of different length (a sequence of frames).

Legend: T tokens of a batch, packed; n spans; L tokens of a span; h heads; d width of a head.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, span: int) -> Tensor:
    """Attention within spans of equal length.

    Args:
        q, k, v: (T, h, d), any strides.
        span: L, dividing T; tokens [i*L, (i+1)*L) see each other and nothing else.

    Returns:
        (T, h, d), contiguous.
    """
    q, k, v = (x.unflatten(0, (-1, span)).transpose(1, 2) for x in (q, k, v))  # (n, h, L, d)
    out = _matmul_attention(q, k, v) if _matmul_is_faster(q) else F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(0, 1)


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Attention within spans of different length, lying one behind another.

    Args:
        q, k, v: (T, h, d), any strides.
        cu_seqlens: (n + 1,) integer on the CPU, where spans begin and end: 0, L_0, L_0 + L_1, ..., T.
        max_seqlen: the longest span.

    Returns:
        (T, h, d).
    """
    if max_seqlen * (len(cu_seqlens) - 1) == len(q):  # all equal: one call does them all
        return dense_attention(q, k, v, max_seqlen)
    spans = list(pairwise(cu_seqlens.tolist()))
    # One call a run of equal neighbours: runs are slices, so nothing is copied to form a batch.
    runs: list[list[int]] = []
    for start, end in spans:
        if runs and runs[-1][2] == end - start:
            runs[-1][1] = end
        else:
            runs.append([start, end, end - start])
    return torch.cat([dense_attention(q[a:b], k[a:b], v[a:b], span) for a, b, span in runs])


def _matmul_is_faster(q: Tensor) -> bool:
    # SDPA's backward on the CPU takes 3 to 8 times the explicit products in bfloat16 (docs/LOG.md, 2026-11-23).
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= 1024


def _matmul_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1) @ v

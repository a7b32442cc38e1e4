"""Attention within spans of different length."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastmum.attention.choice import choose_backend
from fastmum.attention.spans import Spans


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str = "auto",
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> Tensor:
    """Attention within spans of different length, lying one behind another.

    Args:
        q, k, v: (T, h, d) of one floating-point dtype, any strides.
        cu_seqlens: (n + 1,) int32 or int64, where spans begin and end: 0, L_0, L_0 + L_1, ..., T. Spans may be empty.
            On the device of q or on the CPU; `sdpa`, `xformers` and `flex` read it on the CPU.
        max_seqlen: no span is longer.
        backend: "auto" or a name of `BACKENDS`.
        cu_seqlens_q, max_seqlen_q: spans of queries, where q has (T_q, h, d) with fewer tokens than k and v.

    Returns:
        (T_q, h, d), contiguous, in the dtype of q. Differentiable in q, k and v.

    Raises:
        AttentionError: a backend that is unknown or cannot run on the device of q.
        TypeError, ValueError: an argument that does not fit, named with what came and what is allowed.
    """
    cu_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    spans = Spans(cu_q, cu_seqlens, max_seqlen if max_seqlen_q is None else max_seqlen_q, max_seqlen)
    _check(q, k, v, spans)
    chosen = choose_backend(backend, q.device, q.dtype)
    return chosen.attend(q, k, v, chosen.plan(spans, q.device))


def _check(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> None:
    tensors = {"q": q, "k": k, "v": v, "cu_seqlens": spans.cu_k, "cu_seqlens_q": spans.cu_q}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}, but must be a tensor")
        if name in ("k", "v") and x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}, but q, k and v must be on one device")
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.ndim != 3 or x.shape[1:] != q.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but q, k and v must be (T, heads, width) alike")
        if x.dtype != q.dtype or not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}, but q, k and v must be of one floating-point dtype")
    if len(k) != len(v):
        raise ValueError(f"k has {len(k)} tokens and v {len(v)}, but each key has a value")
    for name, cu, longest, tokens in (
        ("cu_seqlens", spans.cu_k, spans.max_k, len(k)),
        ("cu_seqlens_q", spans.cu_q, spans.max_q, len(q)),
    ):
        if cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} has dtype {cu.dtype}, but must be int32 or int64")
        if cu.ndim != 1 or len(cu) != len(spans.cu_k) or len(cu) < 2:
            raise ValueError(f"{name} has shape {tuple(cu.shape)}, but must be (n + 1,) for n spans, n at least 1")
        # Reading it on a GPU would wait for the device; compiled code cannot look at it at all.
        if cu.device.type == "cpu" and not torch.compiler.is_compiling():
            ends = cu.tolist()
            if ends[0] != 0 or ends[-1] != tokens or ends != sorted(ends):
                raise ValueError(f"{name} must rise from 0 to the number of tokens, {tokens}, but is {ends}")
            if (there := max(b - a for a, b in pairwise(ends))) > longest:
                bound = "max_seqlen" + name.removeprefix("cu_seqlens")
                raise ValueError(f"{name} has a span of {there} tokens, but {bound} says {longest} at most")

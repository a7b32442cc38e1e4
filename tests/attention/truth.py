"""What the attention tests share: packed problems, a float64 loop over spans and plain SDPA to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = [32, 48, 64, 128]
LENGTHS = {"ones": [1, 7, 1, 1, 130, 1], "equal": [65] * 4, "ragged": [257, 1, 65, 390], "single": [257]}
ASKING = {"ones": [1, 3, 1, 1, 60, 1], "equal": [48] * 4, "ragged": [192, 1, 48, 290], "single": [192]}


class Problem(NamedTuple):
    """Queries, keys, values and the gradient of the output, packed."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    queries: list[int]
    keys: list[int]

    @property
    def spans(self) -> dict[str, Tensor | int]:
        """What `ragged_attention` is told about the spans."""
        return {
            "cu_seqlens": cumulated(self.keys),
            "max_seqlen": max(self.keys),
            "cu_seqlens_q": cumulated(self.queries),
            "max_seqlen_q": max(self.queries),
        }


def cumulated(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """Where spans begin and end, (n + 1,)."""
    return F.pad(torch.tensor(lengths, dtype=dtype).cumsum(0, dtype=dtype), (1, 0))


def problem(
    keys: Sequence[int],
    heads: int = 2,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    queries: Sequence[int] | None = None,
    seed: int = 0,
) -> Problem:
    """Normal values, the same every time; as many queries as keys where nothing else is said."""
    queries = keys if queries is None else queries
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (
        torch.randn(sum(lengths), heads, width, generator=generator).to(dtype)
        for lengths in (queries, keys, keys, queries)
    )
    return Problem(q, k, v, grad, list(queries), list(keys))


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one span in the dtype of its inputs: softmax(q k' / sqrt(d)) v; 0 where there is no key."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention of one span."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def looped(of_span: Callable[..., Tensor], p: Problem) -> Callable[..., Tensor]:
    """One span after the other."""
    return lambda q, k, v: torch.cat(
        [of_span(*span) for span in zip(q.split(p.queries), k.split(p.keys), v.split(p.keys), strict=True)]
    )


def gradients(function: Callable[..., Tensor], p: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The output of `function` and the gradients of q, k and v, all computed in `dtype`."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in p[:3]]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, p.grad.to(out.dtype))


def true_gradients(p: Problem) -> tuple[Tensor, ...]:
    """The same, by the float64 loop over spans."""
    return gradients(looped(dense, p), p, torch.float64)


def relative(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|, or |value| where the truth is 0."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape
    norm = truth.norm()
    return float((value - truth).norm() / (norm if norm > 0 else 1.0))


def worst(value: Tensor, truth: Tensor) -> float:
    """The largest error, in units of the value's size and the root mean square of all: bfloat16 rounds relatively."""
    size = truth.abs() + truth.square().mean().sqrt().clamp_min(1e-12)
    return float(((value.double() - truth) / size).abs().max())

"""Packed problems, a float64 loop over segments, and plain SDPA to compare with."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FLOATS = [torch.float32, torch.bfloat16]
# Queries and keys of segments: whole or as in the last block, equal lengths, ragged ones, single tokens, empty ones.
LENGTHS = {
    "ones": ([1, 7, 1, 1, 130, 1], [1, 7, 1, 1, 130, 1]),
    "equal": ([65] * 4, [65] * 4),
    "equal, subset": ([48] * 4, [65] * 4),
    "ragged": ([257, 1, 65, 390], [257, 1, 65, 390]),
    "ragged, subset": ([192, 1, 48, 290], [257, 1, 65, 390]),
    "single, subset": ([192], [257]),
    "empty": ([0, 192, 0, 0, 48, 0], [0, 257, 0, 0, 65, 0]),
}


class Problem(NamedTuple):
    """Queries, keys, values and the gradient of the output, packed."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    queries: list[int]
    keys: list[int]

    @property
    def segments(self) -> dict[str, Tensor | int]:
        """Arguments of `ragged_attention`."""
        queries = {"cu_seqlens_q": cumulated(self.queries), "max_seqlen_q": max(self.queries)}
        return {"cu_seqlens": cumulated(self.keys), "max_seqlen": max(self.keys)} | queries


def cumulated(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """Cumulative lengths, (n + 1,)."""
    return F.pad(torch.tensor(lengths, dtype=dtype).cumsum(0, dtype=dtype), (1, 0))


def problem(
    keys: Sequence[int], heads: int = 2, width: int = 16, dtype: torch.dtype = torch.float32,
    queries: Sequence[int] | None = None, seed: int = 0,
) -> Problem:  # fmt: skip
    """Normal values from a seed; as many queries as keys by default."""
    queries = keys if queries is None else queries
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (
        torch.randn(sum(lengths), heads, width, generator=generator).to(dtype)
        for lengths in (queries, keys, keys, queries)
    )
    return Problem(q, k, v, grad, list(queries), list(keys))


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one segment in the dtype of its inputs, softmax(q k' / sqrt(d)) v; 0 without keys."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention of one segment."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def looped(of_segment: Callable[..., Tensor], p: Problem) -> Callable[..., Tensor]:
    """One segment after the other."""
    splits = lambda q, k, v: zip(q.split(p.queries), k.split(p.keys), v.split(p.keys), strict=True)  # noqa: E731
    return lambda q, k, v: torch.cat([of_segment(*x) for x in splits(q, k, v)])


def gradients(function: Callable[..., Tensor], p: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The output of `function` and the gradients of q, k and v, all computed in `dtype`."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in p[:3]]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, p.grad.to(out.dtype))


def true_gradients(p: Problem) -> tuple[Tensor, ...]:
    """The same by the float64 loop over segments."""
    return gradients(looped(dense, p), p, torch.float64)


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def relative(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|, or |value| if the truth is 0."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape
    norm = truth.norm()
    return float((value - truth).norm() / (norm if norm > 0 else 1.0))


def worst(value: Tensor, truth: Tensor) -> float:
    """The largest error, relative to the value's size plus the root mean square: bfloat16 rounds relatively."""
    size = truth.abs() + truth.square().mean().sqrt().clamp_min(1e-12)
    return float(((value.double() - truth) / size).abs().max())


def assert_within(ours: Sequence[Tensor], p: Problem, tolerance: float) -> None:
    """Output and gradients within a relative distance of the truth."""
    for name, value, true in zip(("out", "dq", "dk", "dv"), ours, true_gradients(p), strict=True):
        assert value.dtype == p.q.dtype
        assert relative(value, true) <= tolerance, name


def assert_as_good_as_plain(ours: Sequence[Tensor], p: Problem, factor: float = 1.1, largest: float = 2.0) -> None:
    """In bfloat16 errors of at most `factor` times those of torch's attention; in float32 within 1e-5."""
    if p.q.dtype == torch.float32:
        return assert_within(ours, p, 1e-5)
    usual = gradients(looped(plain, p), p)
    for name, value, of_plain, true in zip(("out", "dq", "dk", "dv"), ours, usual, true_gradients(p), strict=True):
        assert value.dtype == p.q.dtype
        assert relative(value, true) <= factor * relative(of_plain, true), name
        # The largest of thousands of errors of a rounding unit or two is mostly chance.
        assert worst(value, true) <= largest * worst(of_plain, true), name
    return None

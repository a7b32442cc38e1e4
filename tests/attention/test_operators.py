"""Attention as an operator: its schema, fake kernel and gradient, and compilation once for all lengths."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from truth import Problem, cumulated, problem

from fastmum.attention import BACKENDS, Spans, dense_attention, ragged_attention

FLOATS = [torch.float32, torch.bfloat16]
FRAMES, TOKENS, MASKED, VIEWS = 8, 5, 3, 6
FORMS = {  # queries and keys, with spans that are empty on either side
    "all ask": ([5, 1, 7, 0, 0], [5, 1, 7, 0, 0]),
    "some ask": ([3, 0, 2, 0, 1], [5, 1, 7, 0, 1]),
    "no keys": ([3, 2], [0, 5]),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def arguments(form: str, dtype: torch.dtype, strided: bool) -> tuple[Problem, Tensor, Tensor]:
    queries, keys = FORMS[form]
    p = problem(keys, 2, 16, dtype, queries)
    if strided:
        p = p._replace(**{name: getattr(p, name).mT.contiguous().mT for name in ("q", "k", "v", "grad")})
    return p, cumulated(queries), cumulated(keys)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str, dtype: torch.dtype, strided: bool) -> None:
    p, *cu = arguments(form, dtype, strided)
    torch.library.opcheck(torch.ops.fastmum.attention_by_spans, (*(x.requires_grad_() for x in p[:3]), *cu))


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_backward(form: str, dtype: torch.dtype, strided: bool) -> None:
    p, *cu = arguments(form, dtype, strided)
    torch.library.opcheck(torch.ops.fastmum.attention_by_spans_backward, (p.grad, *p[:3], *cu))


@pytest.mark.parametrize("wrong", [[0, 5, 6], [0, 5, 14]])
def test_spans_that_do_not_end_with_the_tokens(wrong: list[int]) -> None:
    """The operator sees lengths that compiled code could not check."""
    p = problem([5, 8])
    cu = torch.tensor(wrong, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"spans end at {wrong[-1]} and {wrong[-1]}, but there are 13 queries"):
        torch.ops.fastmum.attention_by_spans(*p[:3], cu, cu)


def gradients(function: Callable[..., Tensor], p: Problem, *args: object) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in p[:3]]
    out = function(*inputs, *args)
    return out.detach(), *torch.autograd.grad(out, inputs, p.grad)


def random_lengths(rng: random.Random) -> list[int]:
    """Sequences of 1 to VIEWS frames, FRAMES in all."""
    lengths: list[int] = []
    while (left := FRAMES - sum(lengths)) > 0:
        lengths.append(rng.randint(1, min(VIEWS, left)))
    return lengths


def attend_ragged(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_q: Tensor) -> Tensor:
    bounds = VIEWS * TOKENS, VIEWS * MASKED
    attended = ragged_attention(q * 2, k, v, cu, bounds[0], cu_seqlens_q=cu_q, max_seqlen_q=bounds[1])
    return torch.relu(attended)


@pytest.mark.parametrize("dtype", FLOATS)
def test_compiles_once_for_all_lengths(dtype: torch.dtype) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend_ragged, fullgraph=True, backend=counter)
    rng, seen = random.Random(0), set()
    for seed in range(20):
        lengths = random_lengths(rng)
        seen.add(tuple(lengths))
        spans = Spans.of_frames(lengths, FRAMES, MASKED, TOKENS, VIEWS)
        p = problem([FRAMES * TOKENS], 2, 16, dtype, [FRAMES * MASKED], seed)
        ours = gradients(compiled, p, spans.cu_k, spans.cu_q)
        eager = gradients(attend_ragged, p, spans.cu_k, spans.cu_q)
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    assert len(seen) > 10
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_plans_compile_once(dtype: torch.dtype) -> None:
    """The way of the model: a plan is made outside compiled code and handed in."""
    counter = CompileCounterWithBackend("aot_eager")
    attend = BACKENDS["sdpa"].attend
    compiled = torch.compile(lambda q, k, v, plan: attend(q, k, v, plan) + 1, fullgraph=True, backend=counter)
    rng = random.Random(1)
    for seed in range(20):
        spans = Spans.of_frames(random_lengths(rng), FRAMES, TOKENS, TOKENS, VIEWS)
        plan = BACKENDS["sdpa"].plan(spans, torch.device("cpu"))
        p = problem([FRAMES * TOKENS], 2, 16, dtype, seed=seed)
        ours, eager = gradients(compiled, p, plan), gradients(attend, p, plan)
        assert torch.equal(ours[0], eager[0] + 1)
        assert all(torch.equal(a, b) for a, b in zip(ours[1:], eager[1:], strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_compiles(dtype: torch.dtype) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dense_attention, fullgraph=True, backend=counter)
    for seed in range(3):
        p = problem([TOKENS] * FRAMES, 2, 16, dtype, seed=seed)
        ours, eager = gradients(compiled, p, TOKENS), gradients(dense_attention, p, TOKENS)
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_autocast_under_the_compiler() -> None:
    p = problem([5, 9])
    cu = F.pad(cumulated(p.keys), (0, 3), value=14)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ragged_attention(q, k, v, cu, 9)

    compiled = gradients(torch.compile(attend, fullgraph=True, backend="aot_eager"), p)
    plainly = gradients(lambda q, k, v: ragged_attention(q, k, v, cu, 9), p)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plainly, strict=True))

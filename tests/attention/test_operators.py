"""Attention as an operator: schema, fake kernel and gradient, and one compilation for all lengths."""

import random

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from truth import FLOATS, cumulated, equal, gradients, problem

from fastmum.attention import BACKENDS, Segments, ragged_attention

FRAMES, TOKENS, MASKED, VIEWS = 8, 5, 3, 6
FORMS = {  # queries and keys, with segments that are empty on either side
    "all": ([5, 1, 7, 0, 0], [5, 1, 7, 0, 0]),
    "subset": ([3, 0, 2, 0, 1], [5, 1, 7, 0, 1]),
    "no keys": ([3, 2], [0, 5]),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("form", "dtype", "strided"),
    [(form, dtype, (i + j) % 2 == 0) for i, form in enumerate(FORMS) for j, dtype in enumerate(FLOATS)],
)
def test_opcheck(form, dtype, strided):
    queries, keys = FORMS[form]
    p, cu = problem(keys, 2, 16, dtype, queries), (cumulated(queries), cumulated(keys))
    if strided:
        p = p._replace(**{name: getattr(p, name).mT.contiguous().mT for name in ("q", "k", "v", "grad")})
    torch.library.opcheck(torch.ops.fastmum.segment_attention_backward, (p.grad, *p[:3], *cu))
    torch.library.opcheck(torch.ops.fastmum.segment_attention, (*(x.requires_grad_() for x in p[:3]), *cu))


@pytest.mark.parametrize("wrong", [[0, 5, 6], [0, 5, 14]])
def test_segments_that_do_not_end_with_the_tokens(wrong):
    """Compiled code cannot check the lengths, the operator does."""
    cu = torch.tensor(wrong, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"segments end at {wrong[-1]} and {wrong[-1]}, but there are 13 queries"):
        torch.ops.fastmum.segment_attention(*problem([5, 8])[:3], cu, cu)


def random_lengths(rng: random.Random) -> list[int]:
    """Sequences of 1 to VIEWS frames, FRAMES in all."""
    lengths: list[int] = []
    while (left := FRAMES - sum(lengths)) > 0:
        lengths.append(rng.randint(1, min(VIEWS, left)))
    return lengths


def attend_ragged(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    cu_q, cu_k, max_q, max_k = segments
    return torch.relu(ragged_attention(q * 2, k, v, cu_k, max_k, cu_seqlens_q=cu_q, max_seqlen_q=max_q))


def attend_by_plan(q: Tensor, k: Tensor, v: Tensor, plan: Segments) -> Tensor:
    """As in the model: the plan is made outside compiled code."""
    return torch.relu(BACKENDS["sdpa"].attend(q * 2, k, v, plan))


@pytest.mark.parametrize(
    ("attend", "dtype"), [(attend_ragged, FLOATS[0]), (attend_ragged, FLOATS[1]), (attend_by_plan, FLOATS[1])]
)
def test_compiles_once_for_all_lengths(attend, dtype):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    rng, seen = random.Random(0), set()
    for seed in range(15):
        lengths = random_lengths(rng)
        seen.add(tuple(lengths))
        segments = Segments.of_frames(lengths, FRAMES, MASKED, TOKENS, VIEWS)
        segments = BACKENDS["sdpa"].plan(segments, torch.device("cpu"))
        p = problem([FRAMES * TOKENS], 2, 16, dtype, [FRAMES * MASKED], seed)
        ours, eager = (gradients(lambda *qkv, f=f, s=segments: f(*qkv, s), p) for f in (compiled, attend))
        assert equal(ours, eager)
    assert len(seen) > 8
    assert counter.frame_count == 1

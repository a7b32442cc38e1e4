"""Attention as an operator: schema, fake kernel and gradient, and one compilation for all lengths."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from truth import FLOATS, cumulated, equal, gradients, problem

from fastmum.attention import BACKENDS, Segments, ragged_attention
from fastmum.attention.backend import _groups

FRAMES, TOKENS, MASKED, VIEWS = 8, 5, 3, 6
LENGTHS = [[8 - n, *[1] * n] for n in range(2, 8)] + [[3, 3, 2], [2, 1, 5], [4, 4], [2] * 4]  # of sequences, in frames
FORMS = {  # queries and keys, with segments that are empty on either side
    "all": ([5, 1, 7, 0, 0], [5, 1, 7, 0, 0]),
    "subset": ([3, 0, 2, 0, 1], [5, 1, 7, 0, 1]),
    "no keys": ([3, 2], [0, 5]),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, dtype):
    queries, keys = FORMS[form]
    p, cu = problem(keys, 2, 16, dtype, queries), (cumulated(queries), cumulated(keys))
    if (form == "subset") == (dtype == torch.bfloat16):
        p = p._replace(**{name: getattr(p, name).mT.contiguous().mT for name in ("q", "k", "v", "grad")})
    torch.library.opcheck(torch.ops.fastmum.segment_attention_backward, (p.grad, *p[:3], *cu))
    torch.library.opcheck(torch.ops.fastmum.segment_attention, (*(x.requires_grad_() for x in p[:3]), *cu))


@pytest.mark.parametrize("wrong", [[0, 5, 6], [0, 5, 14]])
def test_segments_that_do_not_end_with_the_tokens(wrong):
    """Compiled code cannot check the lengths, the operator does."""
    cu = torch.tensor(wrong, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"end at {wrong[-1]} .* 13 queries"):
        torch.ops.fastmum.segment_attention(*problem([5, 8])[:3], cu, cu)


def test_equal_segments_are_one_group():
    """Where they follow each other in queries and keys."""
    cu_q, cu_k = cumulated([3, 3, 3, 0, 3, 2]), cumulated([4, 4, 4, 5, 4, 4])
    assert _groups(cu_q, cu_k, 14, 25) == [(3, 0, 0, 3, 4), (1, 9, 17, 3, 4), (1, 12, 21, 2, 4)]


def attend_ragged(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    cu_q, cu_k, max_q, max_k, _ = segments
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
    for seed, lengths in enumerate(LENGTHS):
        segments = Segments.of_frames(lengths, FRAMES, MASKED, TOKENS, VIEWS)
        segments = BACKENDS["sdpa"].plan(segments, torch.device("cpu"))
        p = problem([FRAMES * TOKENS], 2, 16, dtype, [FRAMES * MASKED], seed)
        ours, eager = (gradients(lambda *qkv, f=f, s=segments: f(*qkv, s), p) for f in (compiled, attend))
        assert equal(ours, eager)
    assert counter.frame_count == 1

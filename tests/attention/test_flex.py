"""FlexAttention's document mask: its tiles against the dense mask, and attention under it on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask
from truth import LENGTHS, Problem, cumulated, dense, looped, problem, relative

from fastmum.attention import BACKENDS, Segments, cuda

# On the CPU it holds all scores, which these sizes allow.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
TILE = cuda.TILE


def mask_of(queries: list[int], keys: list[int], padding: int = 0) -> BlockMask:
    cu_q, cu_k = (cumulated(lengths + [0] * padding) for lengths in (queries, keys))
    return BACKENDS["flex"].plan(Segments(cu_q, cu_k, max(queries), max(keys)), torch.device("cpu"))


def tiles(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles of a dense mask with any true value, and tiles that are complete and all true."""
    rows, columns = (-(-n // TILE) for n in mask.shape)
    padded = torch.zeros(rows * TILE, columns * TILE, dtype=torch.bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    padded = padded.view(rows, TILE, columns, TILE)
    return padded.any(3).any(1), padded.all(3).all(1)


def listed(count: Tensor, columns: Tensor, shape: torch.Size) -> Tensor:
    """Column numbers of tiles per row, as in BlockMask -> booleans (rows, columns)."""
    out = torch.zeros(shape, dtype=torch.bool)
    for row in range(shape[0]):
        entries = columns[0, 0, row, : count[0, 0, row]].tolist()
        assert len(set(entries)) == len(entries)
        out[row, entries] = True
    return out


def attend(p: Problem, padding: int = 0) -> Tensor:
    with torch.no_grad():
        return BACKENDS["flex"].attend(*p[:3], mask_of(p.queries, p.keys, padding))


@pytest.mark.parametrize(("lengths", "width"), [*zip(LENGTHS, [32, 48, 64, 128, 48, 64, 48], strict=True)])
def test_values(lengths, width):
    queries, keys = LENGTHS[lengths]
    p = problem(keys, 2, width, queries=queries)
    out = attend(p)
    assert out.is_contiguous()
    assert relative(out, looped(dense, p)(*(x.double() for x in p[:3]))) <= 1e-5


def test_bfloat16_views_and_queries_without_keys():
    p = problem([130, 1, 65], 3, 64, torch.bfloat16)
    q, k, v = torch.stack(p[:3], 1).unbind(1)
    out = attend(p._replace(q=q, k=k, v=v), padding=5)
    assert out.dtype == torch.bfloat16
    assert relative(out, looped(dense, p)(*(x.double() for x in p[:3]))) <= 0.005
    assert attend(problem([5, 0, 3], queries=[5, 4, 3]))[5:9].count_nonzero() == 0


LENGTH = st.one_of(st.integers(1, 40), st.integers(100, 300), st.sampled_from([127, 128, 129, 256, 384]))


@settings(deadline=None, max_examples=60)
@given(keys=st.lists(LENGTH, min_size=1, max_size=8), share=st.integers(1, 4), padding=st.integers(0, 3))
def test_tiles(keys, share, padding):
    """In both directions, and the mask function on all pairs of tokens; every segment has queries, as in the model."""
    queries = [-(-n // share) for n in keys]
    mask = mask_of(queries, keys, padding)
    truth = torch.block_diag(*(torch.ones(q, k) for q, k in zip(queries, keys, strict=True))).bool()
    some, full = tiles(truth)
    partly = listed(mask.kv_num_blocks, mask.kv_indices, some.shape)
    assert torch.equal(listed(mask.full_kv_num_blocks, mask.full_kv_indices, some.shape), full)
    assert torch.equal(partly, some & ~full)
    # For the backward pass, from keys to queries.
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices, some.mT.shape), partly.mT)
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices, some.mT.shape), full.mT)
    assert mask.shape[-2:] == truth.shape
    q, k, zero = torch.arange(truth.shape[0]), torch.arange(truth.shape[1]), torch.tensor(0)
    assert torch.equal(mask.mask_mod(zero, zero, q[:, None], k), truth)


def test_on_cuda_it_is_compiled(monkeypatch):
    """Uncompiled, it would hold the scores of all pairs of tokens."""
    calls = []

    def compiled(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask) -> Tensor:
        calls.append((q, k, v, block_mask))
        return torch.empty_like(q)

    monkeypatch.setattr(cuda, "_compiled_flex", lambda: compiled)
    mask = mask_of([3, 2], [5, 8])
    with FakeTensorMode():
        q, k, v = (torch.empty(n, 2, 64, device="cuda", dtype=torch.bfloat16) for n in (5, 13, 13))
        out = BACKENDS["flex"].attend(q, k, v, mask)
    ((*inputs, block_mask),) = calls
    assert [x.shape[2] for x in inputs] == [5, 13, 13]
    assert block_mask is mask
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")
    assert out.is_contiguous()

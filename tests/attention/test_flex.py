"""FlexAttention's document mask: its tiles against the dense mask, and attention under it on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask
from truth import ASKING, LENGTHS, WIDTHS, Problem, cumulated, dense, looped, problem, relative

from fastmum.attention import BACKENDS, Spans, flex

# On the CPU it holds all scores, which these sizes bear.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")


def mask_of(queries: list[int], keys: list[int], padding: int = 0) -> BlockMask:
    cu_q, cu_k = (cumulated(lengths + [0] * padding) for lengths in (queries, keys))
    return BACKENDS["flex"].plan(Spans(cu_q, cu_k, max(queries), max(keys)), CPU)


def allowed(queries: list[int], keys: list[int]) -> Tensor:
    """(T_q, T_k), true within spans."""
    return torch.block_diag(*(torch.ones(q, k) for q, k in zip(queries, keys, strict=True))).bool()


def tiles(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which tiles of a dense mask hold anything at all, and which are complete and full."""
    rows, columns = (-(-n // flex.BLOCK) for n in mask.shape)
    padded = torch.zeros(rows * flex.BLOCK, columns * flex.BLOCK, dtype=torch.bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    padded = padded.view(rows, flex.BLOCK, columns, flex.BLOCK)
    return padded.any(3).any(1), padded.all(3).all(1)


def listed(count: Tensor, columns: Tensor, shape: torch.Size) -> Tensor:
    """Numbers of tiles of every row, as BlockMask holds them -> booleans (rows, columns)."""
    out = torch.zeros(shape, dtype=torch.bool)
    for row in range(shape[0]):
        entries = columns[0, 0, row, : count[0, 0, row]].tolist()
        assert len(set(entries)) == len(entries)
        out[row, entries] = True
    return out


def check_tiles(mask: BlockMask, truth: Tensor, exact: bool = True) -> None:
    some, full = tiles(truth)
    partly = listed(mask.kv_num_blocks, mask.kv_indices, some.shape)
    fully = listed(mask.full_kv_num_blocks, mask.full_kv_indices, some.shape)
    assert torch.equal(fully, full)
    if exact:
        assert torch.equal(partly, some & ~full)
    else:  # a tile more is only slower: the mask inside decides
        assert (partly & full).count_nonzero() == 0
        assert (partly | full | ~some).all()
    # The way of the backward pass, from keys to queries.
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices, some.mT.shape), partly.mT)
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices, some.mT.shape), full.mT)
    assert mask.shape[-2:] == truth.shape


def check_pairs(mask: BlockMask, truth: Tensor) -> None:
    """What the function of the mask says of every pair of tokens."""
    q, k = (torch.arange(n) for n in truth.shape)
    nowhere = torch.tensor(0)
    assert torch.equal(mask.mask_mod(nowhere, nowhere, q[:, None], k), truth)


def attend(p: Problem, padding: int = 0) -> Tensor:
    with torch.no_grad():
        return BACKENDS["flex"].attend(*p[:3], mask_of(p.queries, p.keys, padding))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("asking", [LENGTHS, ASKING], ids=["all", "some"])
def test_values(lengths: str, asking: dict[str, list[int]], width: int) -> None:
    p = problem(LENGTHS[lengths], 2, width, queries=asking[lengths])
    out = attend(p)
    assert out.is_contiguous()
    assert relative(out, looped(dense, p)(*(x.double() for x in p[:3]))) <= 1e-5


def test_bfloat16_and_views() -> None:
    p = problem([130, 1, 65], 3, 64, torch.bfloat16)
    q, k, v = torch.stack(p[:3], 1).unbind(1)
    out = attend(p._replace(q=q, k=k, v=v), padding=5)
    assert out.dtype == torch.bfloat16
    assert relative(out, looped(dense, p)(*(x.double() for x in p[:3]))) <= 0.005


def test_no_token_reaches_another_span() -> None:
    lengths = [100, 60, 128, 1]
    p = problem(lengths)
    clean = attend(p).split(lengths)
    for victim in range(len(lengths)):
        changed = p._replace(k=p.k.clone(), v=p.v.clone())
        for x in (changed.k, changed.v):
            x.split(lengths)[victim].fill_(100)
        for i, (ours, before) in enumerate(zip(attend(changed).split(lengths), clean, strict=True)):
            assert torch.equal(ours, before) == (i != victim)


LENGTH = st.one_of(st.integers(1, 40), st.integers(100, 300), st.sampled_from([127, 128, 129, 256, 384]))


@settings(deadline=None, max_examples=80)
@given(keys=st.lists(LENGTH, min_size=1, max_size=8), share=st.integers(1, 4), padding=st.integers(0, 3))
def test_tiles(keys: list[int], share: int, padding: int) -> None:
    """Every span has queries and keys, as in the model."""
    queries = [-(-n // share) for n in keys]
    mask, truth = mask_of(queries, keys, padding), allowed(queries, keys)
    check_tiles(mask, truth)
    check_pairs(mask, truth)


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.tuples(st.one_of(st.just(0), LENGTH), st.one_of(st.just(0), LENGTH)), max_size=7))
def test_tiles_of_spans_that_are_empty(lengths: list[tuple[int, int]]) -> None:
    """Without queries, without keys or without both."""
    queries, keys = (list(x) for x in zip(*lengths, (5, 3), strict=True))
    mask, truth = mask_of(queries, keys), allowed(queries, keys)
    check_tiles(mask, truth, exact=False)
    check_pairs(mask, truth)


def test_tiles_by_hand() -> None:
    """Spans of 2 tiles and of 100 tokens: 4 full tiles, 1 partial one, and nothing between them."""
    mask = mask_of([256, 100], [256, 100])
    assert mask.full_kv_num_blocks.tolist() == [[[2, 2, 0]]]
    assert mask.kv_num_blocks.tolist() == [[[0, 0, 1]]]
    assert mask.kv_indices[0, 0, 2, 0] == 2


def test_queries_without_keys_get_nothing() -> None:
    p = problem([5, 0, 3], queries=[5, 4, 3])
    out = attend(p)
    assert out[5:9].count_nonzero() == 0
    assert relative(out, looped(dense, p)(*(x.double() for x in p[:3]))) <= 1e-5


def test_on_cuda_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, it would hold the scores of all tokens with all tokens."""
    calls = []

    def compiled(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask) -> Tensor:
        calls.append((q, k, v, block_mask))
        return torch.empty_like(q)

    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    mask = mask_of([3, 2], [5, 8])
    with FakeTensorMode():
        q, k, v = (torch.empty(n, 2, 64, device="cuda", dtype=torch.bfloat16) for n in (5, 13, 13))
        out = BACKENDS["flex"].attend(q, k, v, mask)
    ((*inputs, block_mask),) = calls
    assert [tuple(x.shape) for x in inputs] == [(1, 2, 5, 64), (1, 2, 13, 64), (1, 2, 13, 64)]
    assert block_mask is mask
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")
    assert out.is_contiguous()

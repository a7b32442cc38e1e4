"""What makes a batch cost what it must and no more: bounds, padding, masked patches alone, recomputation."""

import pytest
import torch

from fastmum.attention import Spans
from fastmum.model.block import Asking
from fastmum.model.encoder import RECOMPUTE
from fastmum.model.masking import seeded_noise


def frames(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def noise(count: int) -> torch.Tensor:
    return seeded_noise(0, 0, 0, count, 6)


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_spans_have_as_many_entries_whatever_the_lengths(lengths):
    spans = Spans.of_frames(torch.tensor(lengths), 5, queries=3, keys=7, views=4)
    assert spans.cu_q.shape == spans.cu_k.shape == (6,)
    assert spans.cu_q.dtype == torch.int32
    ends = torch.tensor([0, *lengths]).cumsum(0)
    expected = torch.cat([ends, torch.full((5 - len(lengths),), 5)])
    assert torch.equal(spans.cu_q, 3 * expected.int())
    assert torch.equal(spans.cu_k, 7 * expected.int())
    assert (spans.max_q, spans.max_k) == (12, 28)


def test_lengths_may_be_padded_and_bounded(tiny):
    expected = tiny(frames(5), [3, 2], 0.5, noise(5))
    padded = tiny(frames(5), torch.tensor([3, 2, 0, 0, 0]), 0.5, noise(5), max_views=3)
    assert torch.equal(padded.pred, expected.pred)
    with pytest.raises(ValueError, match="max_views is 2, but a sequence has 3 frames"):
        tiny(frames(5), [3, 2], 0.5, noise(5), max_views=2)
    with pytest.raises(ValueError, match="at least one frame"):
        tiny(frames(5), torch.tensor([3, 0, 2]), 0.5, noise(5))


def test_the_last_block_computes_masked_patches_alone(tiny):
    """Its MLP sees F * M tokens, all others every token."""
    seen = []
    for block in (*tiny.decoder_frame_blocks, *tiny.decoder_global_blocks):
        block.mlp.register_forward_hook(lambda _module, args, _out: seen.append(len(args[0])))
    tiny(frames(4), [4], 0.5, noise(4))
    assert seen == [4 * 7, 4 * 3]


def test_a_block_that_some_ask_returns_their_tokens(tiny):
    """The same numbers as for all tokens, forward and backward."""
    captured = []
    block = tiny.decoder_global_blocks[-1]
    block.register_forward_pre_hook(lambda _module, args: captured.append(args))
    tiny(frames(4), [1, 3], 0.5, noise(4))
    x, normed, context, *norm = captured[0]
    assert isinstance(context.asking, Asking)
    x, normed = (y.detach().requires_grad_() for y in (x, normed))
    some = block(x, normed, context, *norm)
    everyone = Spans.of_frames([1, 3], 4, 7, 7, 4)
    backend = context.attend.func.__self__
    whole_context = type(context)(
        lambda q, k, v: backend.attend(q, k, v, everyone), context.positions, context.sin, context.cos, context.special
    )
    whole = [context.asking.take(y) for y in block(x, normed, whole_context, *norm)]
    torch.testing.assert_close(list(some), whole, rtol=1e-5, atol=1e-6)
    weights = [torch.randn_like(y) for y in some]
    # `norm1` made what the block is given.
    parameters = [x, normed, *norm, *(p for name, p in block.named_parameters() if not name.startswith("norm1"))]
    losses = (sum((y * weight).sum() for y, weight in zip(ys, weights, strict=True)) for ys in (some, whole))
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputation_changes_no_result_and_keeps_less(tiny, autocast):
    kept, results = {}, {}
    for recompute in RECOMPUTE:
        tiny.set_recompute(recompute)
        sizes = {}

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            loss = tiny(frames(6), [2, 4], 0.5, noise(6)).loss
        kept[recompute] = sum(sizes.values())
        results[recompute] = [loss, *torch.autograd.grad(loss, list(tiny.parameters()))]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results.values(), strict=True))
    # Weights and what lies between blocks are kept by all.
    assert kept["mlp"] < 0.95 * kept["none"]
    assert kept["blocks"] < 0.6 * kept["none"]


def test_recomputation_of_something_else_is_refused(tiny):
    with pytest.raises(ValueError, match="recompute is 'all', but must be one of none, mlp, blocks"):
        tiny.set_recompute("all")

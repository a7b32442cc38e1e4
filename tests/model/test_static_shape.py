"""The cost of a batch: bounds, padding, the last block's query subset, recomputation, frozen parts."""

import pytest
import torch

from fastmum.attention import Segments
from fastmum.model.encoder import RECOMPUTE
from fastmum.model.inputs import seeded_noise


def frames(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def noise(count: int) -> torch.Tensor:
    return seeded_noise(0, 0, 0, count, 6)


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1, 1, 1], [4, 1]])
def test_segments_have_a_fixed_number_of_entries(lengths):
    segments = Segments.of_frames(torch.tensor(lengths), 5, queries=3, keys=7, max_views=4)
    assert segments.cu_seqlens_q.dtype == torch.int32
    expected = torch.tensor([0, *lengths, *[0] * (5 - len(lengths))]).cumsum(0).int()
    assert torch.equal(segments.cu_seqlens_q, 3 * expected)
    assert torch.equal(segments.cu_seqlens_k, 7 * expected)
    assert segments[2:] == (12, 28)


def test_lengths_may_be_padded_and_bounded(tiny):
    expected = tiny(frames(5), [3, 2], 0.5, noise(5))
    padded = tiny(frames(5), torch.tensor([3, 2, 0, 0, 0]), 0.5, noise(5), max_views=3)
    assert torch.equal(padded.pred, expected.pred)
    with pytest.raises(ValueError, match="max_views is 2, but a sequence has 3 frames"):
        tiny(frames(5), [3, 2], 0.5, noise(5), max_views=2)
    with pytest.raises(ValueError, match="at least one frame"):
        tiny(frames(5), torch.tensor([3, 0, 2]), 0.5, noise(5))


def test_the_last_block_computes_only_masked_patches(tiny):
    """Its MLP sees F * M tokens, all others every token."""
    seen = []
    for block in (*tiny.decoder_frame_blocks, *tiny.decoder_global_blocks):
        block.mlp.register_forward_hook(lambda _module, args, _out: seen.append(len(args[0])))
    tiny(frames(4), [4], 0.5, noise(4))
    assert seen == [4 * 7, 4 * 3]


def test_a_query_subset_gives_the_numbers_of_all_queries(tiny):
    """Forward and backward."""
    captured = []
    block = tiny.decoder_global_blocks[-1]
    block.register_forward_pre_hook(lambda _module, args: captured.append(args))
    tiny(frames(4), [1, 3], 0.5, noise(4))
    x, normed, context, *norm = captured[0]
    x, normed = (y.detach().requires_grad_() for y in (x, normed))
    some = block(x, normed, context, *norm)
    segments = Segments.of_frames([1, 3], 4, 7, 7, 4)
    backend = context.attend.func.__self__
    whole_context = type(context)(
        lambda q, k, v: backend.attend(q, k, v, segments), context.positions, context.sin, context.cos, context.special
    )
    whole = [context.subset.take(y) for y in block(x, normed, whole_context, *norm)]
    torch.testing.assert_close(list(some), whole, rtol=1e-5, atol=1e-6)
    weights = [torch.randn_like(y) for y in some]
    # `norm1` made what the block is given.
    parameters = [x, normed, *norm, *(p for name, p in block.named_parameters() if not name.startswith("norm1"))]
    losses = (sum((y * weight).sum() for y, weight in zip(ys, weights, strict=True)) for ys in (some, whole))
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def saved_bytes(function) -> tuple[torch.Tensor, int]:
    """The result of a function, and the bytes of the distinct tensors that it saves for the backward pass."""
    sizes: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function()
    return out, sum(sizes.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputation_changes_no_result_and_saves_less(tiny, autocast):
    saved, results = {}, {}
    for recompute in RECOMPUTE:
        tiny.set_recompute(recompute)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, saved[recompute] = saved_bytes(lambda: tiny(frames(6), [2, 4], 0.5, noise(6)).loss)
        results[recompute] = [loss, *torch.autograd.grad(loss, list(tiny.parameters()))]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results.values(), strict=True))
    # All save weights, and the stream between blocks.
    assert saved["mlp"] < 0.95 * saved["none"]
    assert saved["blocks"] < 0.6 * saved["none"]
    with pytest.raises(ValueError, match="recompute is 'all'"):
        tiny.set_recompute("all")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_frozen_parts(tiny, autocast, compiled):
    """A frozen encoder saves nothing; frozen decoder blocks save less, and change no other gradient."""

    run = torch.compile(tiny, fullgraph=True, backend="aot_eager") if compiled else tiny

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return run(frames(6), torch.tensor([2, 4]), 0.5, noise(6)).loss

    loss, everything = saved_bytes(step)
    full = dict(zip(dict(tiny.named_parameters()), torch.autograd.grad(loss, list(tiny.parameters())), strict=True))
    tiny.decoder_global_blocks.requires_grad_(False)
    for parameter in (p for name, p in tiny.named_parameters() if not name.startswith("decoder")):
        parameter.requires_grad_(False)
    if not compiled:
        pixels_and_ids = tiny._all_patches(frames(6), "frames")
        assert saved_bytes(lambda: tiny.encode(*pixels_and_ids))[1] == 0
    loss, some = saved_bytes(step)
    assert some < 0.7 * everything
    trained = {name: p for name, p in tiny.named_parameters() if p.requires_grad}
    for name, grad in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
        assert torch.equal(grad, full[name]), name

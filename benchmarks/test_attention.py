"""Attention across the frames of a sequence: every available backend against torch's, sequence by sequence.

For equal lengths the reference is one call of `scaled_dot_product_attention`, as in the released model; for ragged
ones, one call per sequence. Backends make their plan once per batch, which is not timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.duel import FASTMUM, REFERENCE, Duel
from benchmarks.sizes import Sizes
from fastmum.attention import BACKENDS, Segments, dense_attention
from fastmum.attention.backend import ragged_lengths


class Heads:
    """Queries, keys, values and the gradient of the output, (T, h, d), of some sequences."""

    def __init__(self, sizes: Sizes, lengths: list[int]) -> None:
        model, generator = sizes.model, torch.Generator().manual_seed(0)
        self.sizes, self.lengths = sizes, lengths
        heads, tokens = model.decoder_num_heads, 1 + sizes.patches
        shape = (sum(lengths) * tokens, heads, model.decoder_embed_dim // heads)
        self.q, self.k, self.v, self.grad = (
            torch.randn(shape, generator=generator).to(sizes.device, sizes.dtype) for _ in range(4)
        )
        self.tokens = [n * tokens for n in lengths]
        # Operations of scores and of weighted values: forward, and twice that backward.
        self.flops = 4 * model.decoder_embed_dim * sum(n * n for n in self.tokens)

    def plan(self, name: str) -> object:
        """A backend's plan for these sequences."""
        tokens, most = 1 + self.sizes.patches, max(self.lengths)
        segments = Segments.of_frames(self.lengths, sum(self.lengths), tokens, tokens, most)
        return BACKENDS[name].plan(segments, self.sizes.device)

    def passes(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], backward: bool) -> Callable[[], list[Tensor]]:
        """A call of forward, or of forward and backward."""
        q, k, v = (x.detach().clone().requires_grad_(backward) for x in (self.q, self.k, self.v))

        def run() -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                out = attend(q, k, v)
            return [out, *torch.autograd.grad(out, (q, k, v), self.grad)] if backward else [out]

        return run


def by_sequence(lengths: list[int]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's attention: one call for equal lengths, else one per sequence."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(set(lengths)) == 1:
            return batched(q, k, v, lengths[0])
        sequences = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([batched(*sequence, len(sequence[0])) for sequence in sequences])

    return attend


def batched(q: Tensor, k: Tensor, v: Tensor, seqlen: int) -> Tensor:
    """(T, h, d) as (n, h, L, d) in one call."""
    q, k, v = (x.unflatten(0, (-1, seqlen)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
@pytest.mark.parametrize("kind", ["equal", "ragged"])
@pytest.mark.parametrize("name", BACKENDS)
def test_across_frames(duel: Duel, sizes: Sizes, name: str, kind: str, backward: bool) -> None:
    backend = BACKENDS[name]
    if reason := backend.why_not(sizes.device) or backend.why_not_dtype(sizes.dtype):
        pytest.skip(f"attention backend '{name}': {reason}")
    equal = [sizes.views] * (sizes.frames // sizes.views)
    heads = Heads(sizes, equal if kind == "equal" else ragged_lengths(sizes.frames, 24))
    plan = heads.plan(name)
    contestants = {
        REFERENCE: heads.passes(by_sequence(heads.tokens), backward),
        FASTMUM: heads.passes(lambda q, k, v: backend.attend(q, k, v, plan), backward),
    }
    what = f"{name}, {' + '.join(map(str, heads.lengths))} frames, {'forward + backward' if backward else 'forward'}"
    duel("attention", what, contestants, flops=(3 if backward else 1) * heads.flops, dtype=sizes.precision)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
def test_within_frames(duel: Duel, sizes: Sizes, backward: bool) -> None:
    """The decoder's frame blocks."""
    heads = Heads(sizes, [1] * sizes.frames)
    contestants = {
        REFERENCE: heads.passes(by_sequence(heads.tokens), backward),
        FASTMUM: heads.passes(lambda q, k, v: dense_attention(q, k, v, heads.tokens[0]), backward),
    }
    what = f"within {sizes.frames} frames, {'forward + backward' if backward else 'forward'}"
    duel("attention", what, contestants, flops=(3 if backward else 1) * heads.flops, dtype=sizes.precision)

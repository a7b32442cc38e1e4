"""Attention over packed tokens against a float64 loop over spans."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmum.attention import dense_attention, ragged_attention


def by_hand(q, k, v, lengths):
    outputs = []
    for qi, ki, vi in zip(*(x.double().split(lengths) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", qi, ki) / q.shape[-1] ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vi))
    return torch.cat(outputs)


def packed(lengths, heads=2, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(lengths))
    x = torch.randn(sum(lengths), 3, heads, width, generator=generator).to(dtype)
    return x, torch.tensor([0, *lengths]).cumsum(0), max(lengths)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_ragged_spans_and_gradients(lengths):
    qkv, cu_seqlens, longest = packed(lengths)
    qkv.requires_grad_()
    out = ragged_attention(*qkv.unbind(1), cu_seqlens, longest)
    truth = by_hand(*qkv.unbind(1), lengths)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    (ours,) = torch.autograd.grad((out * weight).sum(), qkv)
    (theirs,) = torch.autograd.grad((truth * weight).sum(), qkv)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [32, 48, 64, 128])
def test_bfloat16_stays_near_plain_sdpa(width):
    qkv, cu_seqlens, longest = packed([65, 130, 65], heads=3, width=width, dtype=torch.bfloat16)
    q, k, v = qkv.unbind(1)
    truth = by_hand(q, k, v, [65, 130, 65])
    parts = [x.split([65, 130, 65]) for x in (q, k, v)]
    plain = torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in span)).transpose(0, 1)
            for span in zip(*parts, strict=True)
        ]
    )
    error = (ragged_attention(q, k, v, cu_seqlens, longest).double() - truth).norm()
    # The explicit products of the CPU round scores to bfloat16, SDPA does not: twice the error for a faster backward.
    assert error <= 2.5 * (plain.double() - truth).norm()


def test_dense_is_ragged_with_equal_spans():
    qkv, cu_seqlens, longest = packed([5, 5, 5])
    q, k, v = qkv.unbind(1)
    torch.testing.assert_close(dense_attention(q, k, v, 5), ragged_attention(q, k, v, cu_seqlens, longest))

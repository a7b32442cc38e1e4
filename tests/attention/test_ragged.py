"""Attention within spans on the CPU against a float64 loop over them: values, gradients, independence, arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from truth import (
    ASKING,
    LENGTHS,
    WIDTHS,
    Problem,
    cumulated,
    gradients,
    looped,
    plain,
    problem,
    relative,
    true_gradients,
    worst,
)

from fastmum.attention import dense_attention, products, ragged_attention

FLOATS = [torch.float32, torch.bfloat16]
NAMES = ["out", "dq", "dk", "dv"]


@pytest.fixture(autouse=True)
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty_like` returns NaN: what is left unwritten shows."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: torch.full_like(x, float("nan"), **kwargs))


def ragged(p: Problem, backend: str = "sdpa") -> Callable[..., Tensor]:
    return lambda q, k, v: ragged_attention(q, k, v, backend=backend, **p.spans)


def assert_within(p: Problem, tolerance: float, function: Callable[..., Tensor] | None = None) -> None:
    ours, truth = gradients(function or ragged(p), p), true_gradients(p)
    for name, value, true in zip(NAMES, ours, truth, strict=True):
        assert value.dtype == p.q.dtype
        assert relative(value, true) <= tolerance, name


def equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Values and gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("asking", [LENGTHS, ASKING], ids=["all", "some"])
@pytest.mark.parametrize("backend", ["sdpa", "auto"])
def test_float32(lengths: str, asking: dict[str, list[int]], width: int, backend: str) -> None:
    p = problem(LENGTHS[lengths], 2, width, queries=asking[lengths])
    assert_within(p, 1e-5, ragged(p, backend))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("asking", [LENGTHS, ASKING], ids=["all", "some"])
def test_bfloat16_is_as_good_as_plain_sdpa(lengths: str, asking: dict[str, list[int]], width: int) -> None:
    p = problem(LENGTHS[lengths], 3, width, torch.bfloat16, asking[lengths])
    ours, plainly, truth = gradients(ragged(p), p), gradients(looped(plain, p), p), true_gradients(p)
    for name, value, of_plain, true in zip(NAMES, ours, plainly, truth, strict=True):
        assert value.dtype == torch.bfloat16
        assert relative(value, true) <= 1.1 * relative(of_plain, true), name
        # The worst of thousands of values, each off by a rounding unit or two, is mostly chance.
        assert worst(value, true) <= 2.0 * worst(of_plain, true), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_as_good(dtype: torch.dtype) -> None:
    p = problem([65] * 6, 3, 64, dtype)
    ours, plainly = gradients(lambda q, k, v: dense_attention(q, k, v, 65), p), gradients(looped(plain, p), p)
    for value, of_plain, true in zip(ours, plainly, true_gradients(p), strict=True):
        assert relative(value, true) <= (1e-5 if dtype == torch.float32 else 1.1 * relative(of_plain, true))


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8), data=st.data())
def test_any_lengths(lengths: list[tuple[int, int]], data: st.DataObject) -> None:
    """Spans without tokens, without queries or without keys among them; in both ways of computing."""
    p = problem([keys for _, keys in lengths], 2, 8, queries=[queries for queries, _ in lengths])
    assert_within(p, 1e-5)
    half = Problem(*(x.bfloat16() for x in p[:4]), p.queries, p.keys)
    assert_within(half, 0.02)  # a few roundings of 2^-9 each


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert_within(problem([5, 65, 1], dtype=dtype), {torch.float16: 2e-3, torch.float64: 1e-12}[dtype])


def test_large_scores() -> None:
    p = problem([65, 33], 2, 64, torch.bfloat16)
    p = p._replace(q=p.q * 30, k=p.k * 30)
    for value, of_plain, true in zip(
        gradients(ragged(p), p), gradients(looped(plain, p), p), true_gradients(p), strict=True
    ):
        assert value.isfinite().all()
        assert relative(value, true) <= 1.1 * relative(of_plain, true)


def test_gradcheck() -> None:
    p = problem([3, 1, 2], 2, 4, torch.float64, queries=[2, 1, 2])
    inputs = [x.requires_grad_() for x in p[:3]]
    assert torch.autograd.gradcheck(ragged(p), inputs)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs(needed: tuple[int, ...]) -> None:
    p = problem([5, 3])
    inputs = [x.clone().requires_grad_(i in needed) for i, x in enumerate(p[:3])]
    grads = torch.autograd.grad(ragged(p)(*inputs), [inputs[i] for i in needed], p.grad)
    full = gradients(ragged(p), p)
    assert equal(grads, tuple(full[1 + i] for i in needed))


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_views_of_packed_qkv(dtype: torch.dtype) -> None:
    p = problem([5, 1, 7, 7], 3, 16, dtype)
    qkv = torch.stack(p[:3], 1).requires_grad_()  # (T, 3, h, d), as a linear layer returns it
    views = qkv.unbind(1)
    assert not any(x.is_contiguous() for x in views)
    # A gradient that is a broadcast, as of a sum, has no memory of its own for every value.
    grad = p.grad[:1, :, :1].expand_as(p.grad)
    out = ragged(p)(*views)
    assert out.is_contiguous()
    (packed,) = torch.autograd.grad(out, qkv, grad)
    contiguous = gradients(ragged(p), p._replace(grad=grad.contiguous()))
    assert torch.equal(out, contiguous[0])
    assert equal(packed.unbind(1), contiguous[1:])


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_heads_and_features(dtype: torch.dtype) -> None:
    p = problem([5, 1, 7, 7], 3, 16, dtype)
    transposed = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in p[:3]]
    every_second = [x.repeat_interleave(2, -1)[..., ::2] for x in p[:3]]
    assert torch.equal(ragged(p)(*transposed), ragged(p)(*p[:3]))
    assert torch.equal(ragged(p)(*every_second), ragged(p)(*p[:3]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs_stay_as_they_are(dtype: torch.dtype) -> None:
    p = problem([5, 9], dtype=dtype)
    before = [x.clone() for x in p[:4]]
    gradients(ragged(p), p)
    assert equal(p[:4], tuple(before))


@pytest.mark.parametrize("width", [16, 48])  # the scale is a power of two, and is not
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("piece", "piece_of_head"), [(1, 1 << 22), (200, 1 << 22), (1, 1), (1, 40)])
def test_long_spans_in_parts(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int, piece: int, piece_of_head: int
) -> None:
    p = problem([9, 9, 13, 1], 3, width, dtype, queries=[9, 9, 7, 1])
    whole, truth = gradients(ragged(p), p), true_gradients(p)
    monkeypatch.setattr(products, "PIECE", piece)
    monkeypatch.setattr(products, "PIECE_OF_HEAD", piece_of_head)
    for value, reference, true in zip(gradients(ragged(p), p), whole, truth, strict=True):
        # Parts change the order of sums; in bfloat16 each part of a gradient of k and v is rounded.
        assert relative(value, reference) <= (0.005 if dtype == torch.bfloat16 else 1e-6)
        assert relative(value, true) <= (0.01 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_scores_held_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(products, "PIECE", 512)
    monkeypatch.setattr(products, "PIECE_OF_HEAD", 256)
    sizes = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda S, *args, **kw: (sizes.append(S.numel()), softmax(S, *args, **kw))[1])
    gradients(ragged(p := problem([40, 40, 10, 10, 10], 2, 16, dtype)), p)
    assert sizes
    assert max(sizes) <= 512


# Spans ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_form_of_cu_seqlens(dtype: torch.dtype) -> None:
    p = problem([5, 1, 7], dtype=dtype)
    plainly = gradients(ragged(p), p)
    padded = F.pad(cumulated(p.keys), (0, 9), value=sum(p.keys))
    amid = torch.tensor([0, 0, 5, 5, 5, 6, 13, 13])
    for cu in (cumulated(p.keys, torch.int64), padded, padded.long(), amid, torch.stack([padded, padded], 1)[:, 0]):
        for longest in (7, 1000):
            ours = gradients(lambda q, k, v, cu=cu, longest=longest: ragged_attention(q, k, v, cu, longest), p)
            assert equal(ours, plainly)


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_tokens(dtype: torch.dtype) -> None:
    p = problem([0, 0], dtype=dtype)
    assert all(x.shape == (0, 2, 16) for x in gradients(ragged(p), p))


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_token_sees_itself(dtype: torch.dtype) -> None:
    p = problem([1] * 5, dtype=dtype)
    out, dq, dk, dv = gradients(ragged(p), p)
    assert torch.equal(out, p.v)
    assert torch.equal(dv, p.grad)
    assert dq.abs().max() <= 1e-6
    assert dk.abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("poison", [1e4, float("nan"), float("inf")])
def test_no_token_reaches_another_span(dtype: torch.dtype, poison: float) -> None:
    """Whatever stands in one span, no bit of the others changes; it gets no gradient from them."""
    lengths = [5, 9, 9, 1, 30]
    p = problem(lengths, 2, 32, dtype)
    clean = [x.split(lengths) for x in gradients(ragged(p), p)]
    for victim in range(len(lengths)):
        start = sum(lengths[:victim])
        poisoned = p._replace(**{name: getattr(p, name).clone() for name in ("q", "k", "v", "grad")})
        for x in poisoned[:4]:
            x[start : start + lengths[victim]] = poison
        for ours, others in zip(gradients(ragged(p), poisoned), clean, strict=True):
            ours = ours.split(lengths)
            assert all(torch.equal(ours[i], others[i]) for i in range(len(lengths)) if i != victim)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_stay_within_the_span(dtype: torch.dtype) -> None:
    lengths = [5, 9, 9, 1, 30]
    p = problem(lengths, 2, 32, dtype)
    for asked in range(len(lengths)):
        start = sum(lengths[:asked])
        grad = torch.zeros_like(p.grad)
        grad[start : start + lengths[asked]] = p.grad[start : start + lengths[asked]]
        for x in gradients(ragged(p), p._replace(grad=grad))[1:]:
            parts = x.split(lengths)
            assert all(part.count_nonzero() == 0 for i, part in enumerate(parts) if i != asked)
            assert lengths[asked] == 1 or parts[asked].count_nonzero() > 0


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), data=st.data())
def test_order_of_spans_and_of_tokens(lengths: list[int], data: st.DataObject) -> None:
    """Attention knows no order: spans, and the tokens of a span, may be shuffled."""
    p = problem(lengths, 2, 8, torch.float64)
    order = data.draw(st.permutations(range(len(lengths))))
    starts = cumulated(lengths).tolist()
    index = torch.tensor([starts[i] + t for i in order for t in data.draw(st.permutations(range(lengths[i])))])
    shuffled = Problem(*(x[index] for x in p[:4]), [lengths[i] for i in order], [lengths[i] for i in order])
    for ours, straight in zip(gradients(ragged(shuffled), shuffled), gradients(ragged(p), p), strict=True):
        torch.testing.assert_close(ours, straight[index], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_is_ragged_with_equal_spans(dtype: torch.dtype) -> None:
    p = problem([5] * 4, dtype=dtype)
    for ours, of_ragged in zip(
        gradients(lambda q, k, v: dense_attention(q, k, v, 5), p), gradients(ragged(p), p), strict=True
    ):
        torch.testing.assert_close(ours, of_ragged)


# What is around it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    p = problem([5, 9, 9], dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        under = gradients(ragged(p), p)
    assert equal(under, gradients(ragged(p), p))


@pytest.fixture
def precision() -> str:
    """The setting of oneDNN's products, which is global; back to what it was afterwards."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    yield "ieee"
    matmul.fp32_precision = before


def test_precision_of_products_is_restored(precision: str) -> None:
    p = problem([5, 9, 9], dtype=torch.bfloat16)
    gradients(ragged(p), p)
    assert torch.backends.mkldnn.matmul.fp32_precision == precision


@pytest.mark.parametrize("operator", ["softmax", "bmm"])
def test_precision_of_products_is_restored_after_an_error(
    monkeypatch: pytest.MonkeyPatch, precision: str, operator: str
) -> None:
    p = problem([5, 9, 9], dtype=torch.bfloat16)
    inputs = [x.requires_grad_() for x in p[:3]]
    out = ragged(p)(*inputs)
    seen = []

    def fail(*args: object, **kwargs: object) -> None:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        raise MemoryError("no memory for scores")

    monkeypatch.setattr(torch, operator, fail)
    with pytest.raises(MemoryError, match="no memory for scores"):
        ragged(p)(*inputs)
    with pytest.raises(MemoryError, match="no memory for scores"):
        out.backward(p.grad)
    assert seen == ["bf16", "bf16"]
    assert torch.backends.mkldnn.matmul.fp32_precision == precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_float32_stay_exact(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The setting for bfloat16 would round float32 values."""
    seen, softmax = set(), torch.softmax
    matmul = torch.backends.mkldnn.matmul

    def spy(*args: object, **kwargs: object) -> Tensor:
        seen.add(matmul.fp32_precision)
        return softmax(*args, **kwargs)

    before = matmul.fp32_precision
    monkeypatch.setattr(torch, "softmax", spy)
    gradients(ragged(p := problem([5, 9], dtype=dtype)), p)
    assert seen == {before}


# Arguments -----------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(6, 2, 4)
    cu = torch.tensor([0, 2, 6])
    wrong = [
        ((x[:, 0], x, x, cu, 4), {}, ValueError, r"q has shape \(6, 4\).*\(T, heads, width\)"),
        ((x, x[..., :3], x, cu, 4), {}, ValueError, r"k has shape \(6, 2, 3\)"),
        ((x, x, x[:, :1], cu, 4), {}, ValueError, r"v has shape \(6, 1, 4\)"),
        ((x, x, x[:5], cu, 4), {}, ValueError, "k has 6 tokens and v 5"),
        ((x, x.double(), x, cu, 4), {}, TypeError, "k has dtype torch.float64"),
        ((x.int(), x.int(), x.int(), cu, 4), {}, TypeError, "q has dtype torch.int32.*floating-point"),
        ((x, x, x, cu.float(), 4), {}, TypeError, "^cu_seqlens has dtype torch.float32.*int32 or int64"),
        ((x, x, x, cu[:1], 4), {}, ValueError, r"^cu_seqlens has shape \(1,\)"),
        ((x, x, x, cu[None], 4), {}, ValueError, r"^cu_seqlens has shape \(1, 3\)"),
        ((x, x, x, cu - 1, 4), {}, ValueError, "^cu_seqlens must rise from 0 to the number of tokens, 6"),
        ((x, x, x, torch.tensor([0, 7, 6]), 7), {}, ValueError, r"^cu_seqlens must rise from 0 .*is \[0, 7, 6\]"),
        (
            (x, x, x, torch.tensor([0, 2, 5]), 4),
            {},
            ValueError,
            "^cu_seqlens must rise from 0 to the number of tokens, 6",
        ),
        ((x, x, x, cu, 3), {}, ValueError, "^cu_seqlens has a span of 4 tokens, but max_seqlen says 3"),
        ((x[:4], x, x, cu, 4), {}, ValueError, "cu_seqlens_q must rise from 0 to the number of tokens, 4"),
        ((x[:4], x, x, cu, 4), {"cu_seqlens_q": cu[:2]}, ValueError, r"cu_seqlens_q has shape \(2,\)"),
        (
            (x[:4], x, x, cu, 4),
            {"cu_seqlens_q": torch.tensor([0, 1, 4]), "max_seqlen_q": 2},
            ValueError,
            "cu_seqlens_q has a span of 3 tokens, but max_seqlen_q says 2",
        ),
    ]
    for args, kwargs, error, message in wrong:
        with pytest.raises(error, match=message) as caught:
            ragged_attention(*args, **kwargs)
        assert "\n" not in str(caught.value)

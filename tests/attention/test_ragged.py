"""Attention within segments on the CPU: values, gradients, independence of segments, memory, arguments."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from truth import FLOATS, LENGTHS, Problem, assert_as_good_as_plain, assert_within, cumulated, equal, gradients

from truth import problem, relative, true_gradients  # isort: skip

from fastmum.attention import BACKENDS, dense_attention, ragged_attention, sdpa

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty_like` returns NaN, to detect unwritten memory."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: torch.full_like(x, float("nan"), **kwargs))


@pytest.fixture
def precision() -> Iterator[str]:
    """The global setting of oneDNN's products, restored afterwards."""
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    yield "ieee"
    matmul.fp32_precision = before


def ragged(p: Problem, backend: str = "sdpa") -> Callable[..., Tensor]:
    return lambda q, k, v: ragged_attention(q, k, v, backend=backend, **p.segments)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_values_and_gradients(name, dtype):
    """Of every backend that the device has."""
    if reason := BACKENDS[name].why_not(DEVICE) or BACKENDS[name].why_not_dtype(dtype):
        pytest.skip(f"attention backend '{name}': {reason}")
    bounds = {"factor": 1.5, "largest": 3.0} if DEVICE.type == "cuda" else {}
    for (queries, keys), width in zip(LENGTHS.values(), [32, 48, 64, 128, 48, 64, 48], strict=True):
        p = problem(keys, 3, width, dtype, queries)
        p = p._replace(**{x: getattr(p, x).to(DEVICE) for x in ("q", "k", "v", "grad")})
        assert_as_good_as_plain(gradients(ragged(p, name), p), p, **bounds)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dense(dtype):
    p = problem([65] * 6, 3, 64, dtype)
    ours = gradients(lambda q, k, v: dense_attention(q, k, v, 65), p)
    assert_as_good_as_plain(ours, p)
    if dtype == torch.bfloat16:  # on the CPU by the same products
        assert equal(ours, gradients(ragged(p), p))


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
@example(lengths=[(0, 0), (0, 0)])
def test_any_lengths(lengths):
    """With segments without tokens, queries or keys."""
    p = problem([keys for _, keys in lengths], 2, 8, queries=[queries for queries, _ in lengths])
    assert_within(gradients(ragged(p), p), p, 1e-5)
    half = Problem(*(x.bfloat16() for x in p[:4]), p.queries, p.keys)
    assert_within(gradients(ragged(half), half), half, 0.02)  # a few roundings of 2^-9 each


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16, torch.float64])
def test_any_dtype_in_which_autocast_changes_nothing(dtype):
    p = problem([5, 65, 9, 9, 1], dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        under = gradients(ragged(p), p)
    assert equal(under, gradients(ragged(p), p))
    assert_within(under, p, {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 0.02))


def test_large_scores():
    p = problem([65, 33], 2, 64, torch.bfloat16)
    p = p._replace(q=p.q * 30, k=p.k * 30)
    assert_as_good_as_plain(gradients(ragged(p), p), p, largest=10.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_views_of_packed_qkv_and_other_strides(dtype):
    p = problem([5, 1, 7, 7], 3, 16, dtype)
    qkv = torch.stack(p[:3], 1).requires_grad_()  # (T, 3, h, d), as a linear layer returns it
    grad = p.grad[:1, :, :1].expand_as(p.grad)  # broadcast, as that of a sum
    out = ragged(p)(*qkv.unbind(1))
    assert out.is_contiguous()
    (packed,) = torch.autograd.grad(out, qkv, grad)
    contiguous = gradients(ragged(p), p._replace(grad=grad.contiguous()))
    assert torch.equal(out, contiguous[0])
    assert equal(packed.unbind(1), contiguous[1:])
    transposed = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in p[:3]]
    every_second = [x.repeat_interleave(2, -1)[..., ::2] for x in p[:3]]
    assert equal([ragged(p)(*transposed), ragged(p)(*every_second)], 2 * [contiguous[0]])


@pytest.mark.parametrize(
    ("dtype", "width", "block", "head"),  # the scale of width 16 is a power of two, that of 48 is not
    [(FLOATS[0], 16, 1, 1 << 22), (FLOATS[0], 48, 1, 40), (FLOATS[1], 48, 200, 1 << 22), (FLOATS[1], 48, 1, 1)],
)
def test_long_segments_in_blocks(monkeypatch, dtype, width, block, head):
    p = problem([9, 9, 13, 1], 3, width, dtype, queries=[9, 9, 7, 1])
    whole, truth = gradients(ragged(p), p), true_gradients(p)
    monkeypatch.setattr(sdpa, "BLOCK_SCORES", block)
    monkeypatch.setattr(sdpa, "HEAD_SCORES", head)
    for value, reference, true in zip(gradients(ragged(p), p), whole, truth, strict=True):
        # Blocks change the order of sums; in bfloat16 gradients of k and v are rounded per block.
        assert relative(value, reference) <= (0.005 if dtype == torch.bfloat16 else 1e-6)
        assert relative(value, true) <= (0.01 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_scores_held_at_once_are_bounded(monkeypatch, precision, dtype):
    """And the setting for products of bfloat16, which would round other values, is theirs alone."""
    monkeypatch.setattr(sdpa, "BLOCK_SCORES", 512)
    monkeypatch.setattr(sdpa, "HEAD_SCORES", 256)
    seen, softmax, matmul = [], torch.softmax, torch.backends.mkldnn.matmul

    def record(S: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append((S.numel(), matmul.fp32_precision))
        return softmax(S, *args, **kwargs)

    monkeypatch.setattr(torch, "softmax", record)
    p = problem([40, 40, 10, 10, 10], 2, 16, dtype)
    gradients(ragged(p), p)
    sizes, precisions = map(set, zip(*seen, strict=True))
    assert max(sizes) <= 512
    assert precisions == {"bf16" if dtype == torch.bfloat16 else precision}


@pytest.mark.parametrize("dtype", FLOATS)
def test_form_of_cu_seqlens(dtype):
    p = problem([5, 1, 7], dtype=dtype)
    expected = gradients(ragged(p), p)
    padded = F.pad(cumulated(p.keys), (0, 9), value=sum(p.keys))
    with_empty = torch.tensor([0, 0, 5, 5, 5, 6, 13, 13])
    for cu in (cumulated(p.keys, torch.int64), padded, with_empty, torch.stack([padded, padded], 1)[:, 0]):
        assert equal(gradients(lambda q, k, v, cu=cu: ragged_attention(q, k, v, cu, 1000), p), expected)


@pytest.mark.parametrize(("dtype", "poison"), [(FLOATS[0], float("nan")), (FLOATS[1], float("inf")), (FLOATS[1], 1e4)])
def test_no_token_reaches_another_segment(dtype, poison):
    """Values and gradients in one segment change no bit in the others."""
    lengths = [5, 9, 9, 1, 30]
    p = problem(lengths, 2, 32, dtype)
    clean = [x.split(lengths) for x in gradients(ragged(p), p)]
    for victim in range(len(lengths)):
        poisoned = p._replace(**{name: getattr(p, name).clone() for name in ("q", "k", "v", "grad")})
        for x in poisoned[:4]:
            x.split(lengths)[victim].fill_(poison)
        for ours, others in zip(gradients(ragged(p), poisoned), clean, strict=True):
            ours = ours.split(lengths)
            assert all(torch.equal(ours[i], others[i]) for i in range(len(lengths)) if i != victim)


def test_precision_of_products_is_restored(monkeypatch, precision):
    p, matmul = problem([5, 9, 9], dtype=torch.bfloat16), torch.backends.mkldnn.matmul
    inputs = [x.requires_grad_() for x in p[:3]]
    out = ragged(p)(*inputs)
    assert matmul.fp32_precision == precision

    def fail(*args: object, **kwargs: object) -> None:
        assert matmul.fp32_precision == "bf16"
        raise MemoryError("no memory for scores")

    monkeypatch.setattr(torch, "softmax", fail)
    for call in (lambda: ragged(p)(*inputs), lambda: out.backward(p.grad)):
        with pytest.raises(MemoryError):
            call()
        assert matmul.fp32_precision == precision


def test_wrong_arguments_are_named():
    x, cu = torch.zeros(6, 2, 4), torch.tensor([0, 2, 6])
    right = {"q": x, "k": x, "v": x, "cu_seqlens": cu, "max_seqlen": 4}
    of_value = {
        "q": [x[:, 0]], "k": [x[..., :3], x[:5]], "v": [x[:, :1], x.to("meta")],
        "cu_seqlens": [cu[:1], cu[None], cu - 1, torch.tensor([0, 7, 6]), torch.tensor([0, 2, 5])], "max_seqlen": [3],
        "cu_seqlens_q": [cu[:2], torch.tensor([0, 2, 4])], "max_seqlen_q": [3],
    }  # fmt: skip
    of_type = {"q": [x.int()], "k": [x.double()], "cu_seqlens": [[0, 6], cu.float()]}
    for error, wrong in ((ValueError, of_value), (TypeError, of_type)):
        for name, value in ((name, value) for name, values in wrong.items() for value in values):
            with pytest.raises(error, match=rf"\b{name}\b"):
                ragged_attention(**right | {name: value})
    for seqlen in (0, 4):
        with pytest.raises(ValueError, match="seqlen"):
            dense_attention(x, x, x, seqlen)

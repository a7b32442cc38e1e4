"""mlp and its gradients against the float64 reference: products fused and not."""

from __future__ import annotations

import pytest
import torch
from support import DEVICE, assert_close, gradients, guarded, relative, strided

from fastmum.kernels import mlp, reference
from fastmum.kernels.feedforward import KEPT
from fastmum.kernels.products import fuses_products

SIZES = [(1, 16, 16), (37, 48, 64), (5, 33, 199), (150, 64, 257), (9, 130, 300)]  # tokens, width, hidden width


@pytest.fixture(params=["auto", "library"], autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTMUM_PRODUCTS", request.param)
    return request.param


def problem(T: int, D: int, N: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [(T, D), (N, D), (N,), (D, N), (D,)]
    scales = [1, D**-0.5, 1, N**-0.5, 1]
    return [
        guarded((scale * torch.randn(shape, device=DEVICE)).to(dtype))
        for shape, scale in zip(shapes, scales, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", KEPT)
def test_mlp(backend: str, size: tuple[int, ...], dtype: torch.dtype, keep: str) -> None:
    *inputs, last = problem(*size, dtype)
    weight = torch.randn(size[0], size[1], device=DEVICE).to(dtype)
    ours = gradients(lambda *y: mlp(*y, last, keep), inputs, weight)
    usual = gradients(lambda *y: reference.mlp(*y, last), inputs, weight)
    truth = gradients(lambda *y: reference.mlp(*y, last.double()), [y.double() for y in inputs], weight)
    for value, true, of_torch in zip(ours, truth, usual, strict=True):
        assert_close(value, true, of_torch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_changes_no_result(backend: str, dtype: torch.dtype) -> None:
    *inputs, last = problem(37, 48, 130, dtype)
    weight = torch.randn(37, 48, device=DEVICE).to(dtype)
    everything, *others = (gradients(lambda *y, k=k: mlp(*y, last, k), inputs, weight) for k in KEPT)
    for a, b, c in zip(everything, *others, strict=True):
        if backend == "torch" or fuses_products(inputs[0]):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
        else:  # PyTorch's error function forward, Triton's backward
            assert relative(b, a) < 4 * torch.finfo(dtype).eps
            assert relative(c, a) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("keep", "hidden_sized"), [("all", 2), ("hidden", 1), ("input", 0)])
def test_what_is_kept(backend: str, keep: str, hidden_sized: int) -> None:
    inputs = [y.requires_grad_() for y in problem(37, 48, 130, torch.bfloat16)]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        mlp(*inputs, keep)
    assert sum(x.shape == (37, 130) for x in kept) == hidden_sized


def test_the_last_bias_gets_no_gradient_here(backend: str) -> None:
    inputs = [y.requires_grad_() for y in problem(5, 16, 32, torch.bfloat16)]
    mlp(*inputs).sum().backward()
    assert inputs[4].grad is None
    assert all(y.grad is not None for y in inputs[:4])


def test_not_contiguous(backend: str) -> None:
    inputs = problem(11, 48, 64, torch.bfloat16)
    expanded = torch.ones((), dtype=torch.bfloat16, device=DEVICE).expand(11, 48)
    expected = gradients(lambda *y: mlp(*y, inputs[4]), inputs[:4], expanded.contiguous())
    ours = gradients(lambda *y: mlp(*y, inputs[4]), [strided(y) for y in inputs[:4]], expanded)
    for value, true in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, true, rtol=2e-2, atol=2e-2)


def test_the_same_twice(backend: str) -> None:
    *inputs, last = problem(200, 32, 130, torch.bfloat16)
    weight = torch.randn(200, 32, device=DEVICE)
    first, second = (gradients(lambda *y: mlp(*y, last), inputs, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operator_contracts(backend: str) -> None:
    x, weight1, bias1, weight2, _ = problem(7, 32, 48, torch.bfloat16)
    hidden = torch.randn(7, 48, device=DEVICE).bfloat16()
    for keep in (True, False):
        torch.library.opcheck(torch.ops.fastmum.linear_gelu.default, (x, weight1, bias1, keep))
        torch.library.opcheck(torch.ops.fastmum.linear_gelu_backward.default, (x, weight2, hidden, keep))
    again = x.clone(), weight2, x, weight1, bias1
    torch.library.opcheck(torch.ops.fastmum.linear_gelu_again_backward.default, again)


def test_reference_gradcheck() -> None:
    inputs = [y.double().requires_grad_() for y in problem(3, 4, 5, torch.float32)]
    assert torch.autograd.gradcheck(reference.mlp, inputs)


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_in_one_graph(dtype: torch.dtype, keep: str) -> None:
    *inputs, last = problem(7, 32, 48, dtype)
    weight = torch.randn(7, 32, device=DEVICE)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    ours, plain = (gradients(lambda *y, f=f: f(*y, last, keep), inputs, weight) for f in (compiled, mlp))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_who_fuses(backend: str, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, device=DEVICE)
    assert fuses_products(x.bfloat16()) == (backend == "triton" and products == "auto")
    assert not fuses_products(x), "sums of float32 products would be rounded"
    monkeypatch.setenv("FASTMUM_PRODUCTS", "both")
    with pytest.raises(ValueError, match="auto or library"):
        fuses_products(x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "floating point"),
        ({"bias1": torch.zeros(16, dtype=torch.bfloat16)}, TypeError, "must be the same"),
        ({"weight1": torch.zeros(16, 7)}, ValueError, r"weight1 .* \(16, 8\)"),
        ({"weight2": torch.zeros(16, 8)}, ValueError, r"weight2 .* \(8, 16\)"),
        ({"bias2": torch.zeros(16)}, ValueError, r"bias2 .* \(8,\)"),
        ({"bias1": torch.zeros(16, device="meta")}, ValueError, "one device"),
        ({"keep": "nothing"}, ValueError, "all, hidden, input"),
    ],
)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    args = {"x": torch.zeros(4, 8), "weight1": torch.zeros(16, 8), "bias1": torch.zeros(16)}
    args |= {"weight2": torch.zeros(8, 16), "bias2": torch.zeros(8)}
    with pytest.raises(error, match=message):
        mlp(**args | change)

"""mlp and its gradients against the float64 reference, with fused and with library products."""

import pytest
import torch
from asserts import assert_equal, assert_refuses, check, check_compiles, check_frozen, relative
from support import DEVICE, DTYPES, guarded, pairs, results, strided
from torch import Tensor

from fastmum.kernels import mlp, reference
from fastmum.kernels.feedforward import RECOMPUTE
from fastmum.kernels.matmul import fuses_products

SIZES = [(1, 16, 16), (37, 48, 64), (5, 33, 199), (150, 64, 257), (9, 130, 300)]  # tokens, width, hidden width


@pytest.fixture(params=["auto", "library"], autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTMUM_PRODUCTS", request.param)
    return request.param


def problem(T: int, D: int, N: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """x, weight1, bias1, weight2; bias2; the weight of the output."""
    shapes = [(T, D), (N, D), (N,), (D, N), (D,), (T, D)]
    scales = [1, D**-0.5, 1, N**-0.5, 1, 1]
    made = [scale * torch.randn(shape, device=DEVICE) for shape, scale in zip(shapes, scales, strict=True)]
    made = [guarded(x.to(dtype)) for x in made]
    return made[:4], made[4], made[5]


@pytest.mark.parametrize(("size", "dtype", "recompute"), pairs(SIZES, DTYPES, RECOMPUTE))
def test_mlp(backend, size, dtype, recompute):
    inputs, last, weight = problem(*size, dtype)
    check(lambda *y: mlp(*y, last, recompute), lambda *y: reference.mlp(*y, last.to(y[0].dtype)), inputs, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputation_changes_no_result(backend, dtype):
    inputs, last, weight = problem(37, 48, 130, dtype)
    saved, *others = (results(lambda *y, r=r: mlp(*y, last, r), inputs, weight) for r in RECOMPUTE)
    for other in others:
        if backend == "torch" or fuses_products(inputs[0]):
            assert_equal(other, saved)
        else:  # PyTorch's error function forward, Triton's backward
            assert all(relative(a, b) < 4 * torch.finfo(dtype).eps for a, b in zip(other, saved, strict=True))


@pytest.mark.parametrize(
    ("recompute", "needed", "hidden_sized"),
    [("none", (0, 1, 2, 3), 2), ("none", (0,), 1), ("act", (0, 1, 2, 3), 1), ("mlp", (0, 1, 2, 3), 0)],
)
def test_saved_tensors(backend, recompute, needed, hidden_sized):
    """A frozen second layer needs no activation; the last bias gets no gradient."""
    inputs, last, _ = problem(37, 48, 130, torch.bfloat16)
    saved: list[Tensor] = []
    leaves = [y.requires_grad_(i in needed) for i, y in enumerate(inputs)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = mlp(*leaves, last.requires_grad_(), recompute)
    assert sum(x.shape == (37, 130) for x in saved) == hidden_sized
    out.sum().backward()
    assert last.grad is None
    assert [i for i, y in enumerate(leaves) if y.grad is not None] == list(needed)


@pytest.mark.parametrize(
    ("recompute", "needed", "unsaved", "products_of_backward"),
    [("none", (0, 1, 2, 3), (), 4), ("none", (0,), (0,), 2), ("none", (1, 2), (1,), 2),
     ("act", (0, 3), (0,), 3), ("mlp", (0,), (), 3), ("mlp", (1,), (), 3)],
)  # fmt: skip
def test_frozen_inputs(backend, recompute, needed, unsaved, products_of_backward):
    inputs, last, weight = problem(37, 48, 130, torch.bfloat16)
    operations = products_of_backward * 2 * 37 * 48 * 130
    check_frozen(lambda *y: mlp(*y, last, recompute), inputs, [weight], needed, unsaved, operations)


def test_not_contiguous(backend):
    inputs, last, _ = problem(11, 48, 64, torch.bfloat16)
    expanded = torch.ones((), dtype=torch.bfloat16, device=DEVICE).expand(11, 48)
    expected = results(lambda *y: mlp(*y, last), inputs, expanded.contiguous())
    ours = results(lambda *y: mlp(*y, last), [strided(y) for y in inputs], expanded)
    for value, true in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, true, rtol=2e-2, atol=2e-2)


def test_operator_contracts(backend):
    (x, weight1, bias1, weight2), _, _ = problem(7, 32, 48, torch.bfloat16)
    hidden = torch.randn(7, 48, device=DEVICE).bfloat16()
    for keep in (True, False):
        torch.library.opcheck(torch.ops.fastmum.linear_gelu.default, (x, weight1, bias1, keep))
        torch.library.opcheck(torch.ops.fastmum.linear_gelu_backward.default, (x, weight2, hidden, keep))
    again = x.clone(), weight2, x, weight1, bias1
    torch.library.opcheck(torch.ops.fastmum.linear_gelu_again_backward.default, again)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_compiles_in_one_graph(recompute):
    inputs, last, weight = problem(7, 32, 48, torch.bfloat16)
    check_compiles(lambda *y: mlp(*y, last, recompute), inputs, weight)


def test_which_products_are_fused(backend, products, monkeypatch):
    x = torch.zeros(1, device=DEVICE)
    assert fuses_products(x.bfloat16()) == (backend == "triton" and products == "auto")
    assert not fuses_products(x), "sums of float32 products would be rounded"
    monkeypatch.setenv("FASTMUM_PRODUCTS", "both")
    with pytest.raises(ValueError, match="FASTMUM_PRODUCTS is 'both'"):
        fuses_products(x)


def test_refuses():
    args = {"x": torch.zeros(4, 8), "weight1": torch.zeros(16, 8), "bias1": torch.zeros(16)}
    args |= {"weight2": torch.zeros(8, 16), "bias2": torch.zeros(8)}
    changes = [
        ({"bias1": torch.zeros(16, dtype=torch.bfloat16)}, TypeError, "bias1 torch.bfloat16"),
        ({"weight1": torch.zeros(16, 7)}, ValueError, r"weight1 .* \(16, 8\)"),
        ({"weight2": torch.zeros(16, 8)}, ValueError, r"weight2 .* \(8, 16\)"),
        ({"bias2": torch.zeros(16)}, ValueError, r"bias2 .* \(8,\)"),
        ({"recompute": "nothing"}, ValueError, "recompute is 'nothing'"),
    ]
    assert_refuses(mlp, args, changes)

"""mlp and its gradients against the float64 reference, with fused and with library products."""

import pytest
import torch
from asserts import assert_refuses, check, check_compiles, check_frozen
from support import DEVICE, DTYPES, guarded, pairs, strided
from torch import Tensor

from benchmarks import kernel_reference as reference
from fastmum.kernels import mlp
from fastmum.kernels.feedforward import RECOMPUTE
from fastmum.kernels.matmul import fuses_products
from fastmum.kernels.plans import reset

SIZES = [(1, 16, 16), (37, 48, 64), (5, 33, 199), (150, 64, 257), (9, 130, 300)]  # tokens, width, hidden width


pytestmark = pytest.mark.usefixtures("products")


def problem(T: int, D: int, N: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """x, weight1, bias1, weight2; bias2; the weight of the output."""
    shapes = [(T, D), (N, D), (N,), (D, N), (D,), (T, D)]
    scales = [1, D**-0.5, 1, N**-0.5, 1, 1]
    made = [scale * torch.randn(shape, device=DEVICE) for shape, scale in zip(shapes, scales, strict=True)]
    made = [guarded(x.to(dtype)) for x in made]
    return made[:4], made[4], made[5]


def check_mlp(inputs: list[Tensor], last: Tensor, weight: Tensor, recompute: str) -> None:
    check(lambda *y: mlp(*y, last, recompute), lambda *y: reference.mlp(*y, last.to(y[0].dtype)), inputs, weight)


@pytest.mark.parametrize(("size", "dtype", "recompute"), pairs(SIZES, DTYPES, RECOMPUTE))
def test_mlp(backend, size, dtype, recompute):
    check_mlp(*problem(*size, dtype), recompute)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_not_contiguous(backend, recompute):
    inputs, last, _ = problem(11, 48, 64, torch.bfloat16)
    expanded = torch.ones((), dtype=torch.bfloat16, device=DEVICE).expand(11, 48)
    check_mlp([strided(y) for y in inputs], strided(last), expanded, recompute)


@pytest.mark.parametrize(
    ("recompute", "needed", "unsaved", "hidden_sized", "products_of_backward"),
    [("none", (0, 1, 2, 3), (), 2, 4), ("none", (0,), (0,), 1, 2), ("none", (1, 2), (1,), 1, 2),
     ("act", (0, 1, 2, 3), (), 1, 4), ("act", (0, 3), (0,), 1, 3), ("mlp", (0, 1, 2, 3), (), 0, 5),
     ("mlp", (0,), (), 0, 3), ("mlp", (1,), (), 0, 3)],
)  # fmt: skip
def test_what_is_saved_and_computed(backend, recompute, needed, unsaved, hidden_sized, products_of_backward):
    """A frozen second layer needs no activation."""
    inputs, last, weight = problem(37, 48, 130, torch.bfloat16)
    operations = products_of_backward * 2 * 37 * 48 * 130
    saved = check_frozen(lambda *y: mlp(*y, last, recompute), inputs, [weight], needed, unsaved, operations)
    assert sum(x.shape == (37, 130) for x in saved) == hidden_sized


def test_operator_contracts(backend):
    (x, weight1, bias1, weight2), _, _ = problem(7, 32, 48, torch.bfloat16)
    hidden = torch.randn(7, 48, device=DEVICE).bfloat16()
    for keep in (True, False):
        torch.library.opcheck(torch.ops.fastmum.linear_gelu.default, (x, weight1, bias1, keep))
        torch.library.opcheck(torch.ops.fastmum.linear_gelu_backward.default, (x, weight2, hidden, *[None] * 3, keep))
    again = x.clone(), weight2, None, x, weight1, bias1, True
    torch.library.opcheck(torch.ops.fastmum.linear_gelu_backward.default, again)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_compiles_in_one_graph(recompute):
    inputs, last, weight = problem(7, 32, 48, torch.bfloat16)
    check_compiles(lambda *y: mlp(*y, last, recompute), inputs, weight)


def test_which_products_are_fused(backend, products, monkeypatch):
    x, weight = torch.zeros(1, device=DEVICE), torch.zeros(3, 2)
    assert fuses_products(x.bfloat16(), "linear_gelu", weight) == (backend == "triton" and products == "fused")
    assert not fuses_products(x, "linear_gelu", weight), "sums of float32 products would be rounded"
    monkeypatch.setenv("FASTMUM_PRODUCTS", "both")
    reset()
    with pytest.raises(ValueError, match="FASTMUM_PRODUCTS"):
        fuses_products(x, "linear_gelu", weight)


def test_refuses():
    args = {"x": torch.zeros(4, 8), "weight1": torch.zeros(16, 8), "bias1": torch.zeros(16)}
    args |= {"weight2": torch.zeros(8, 16), "bias2": torch.zeros(8)}
    assert_refuses(mlp, args, TypeError, bias1=torch.zeros(16, dtype=torch.bfloat16))
    changes = {"weight1": torch.zeros(16, 7), "weight2": torch.zeros(16, 8), "bias2": torch.zeros(16)}
    assert_refuses(mlp, args, ValueError, **changes, recompute="nothing")

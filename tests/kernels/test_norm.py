"""add_norm and its gradients against the float64 reference."""

import pytest
import torch
from asserts import assert_close, assert_equal, assert_refuses, check_compiles, check_frozen, relative
from support import DEVICE, DTYPES, double, guarded, pairs, results, strided
from torch import Tensor

from benchmarks import kernel_reference as reference
from fastmum.kernels import add_norm

SIZES = [(1, 1), (37, 48), (5, 199), (130, 64), (3, 769), (9, 1024)]  # tokens, width
NAMES = ["total", "normed", "x", "update", "update_bias", "weight", "bias"]  # of `results`


def problem(T: int, D: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """x float32, update and its bias in a dtype, weight and bias of the norm; weights of both outputs."""
    x, update = torch.randn(T, D, device=DEVICE), torch.randn(T, D, device=DEVICE).to(dtype)
    weight, bias = 1 + 0.1 * torch.randn(D, device=DEVICE), torch.randn(D, device=DEVICE)
    inputs = x, update, torch.randn(D, device=DEVICE).to(dtype), weight, bias
    weights = torch.randn(T, D, device=DEVICE), torch.randn(T, D, device=DEVICE).to(dtype)
    return [guarded(y) for y in inputs], [guarded(y) for y in weights]


def plain(x, update, update_bias, weight, bias):
    """The update includes its bias, so the bias's gradient is the sum of the update's."""
    total, normed = reference.add_norm(x, update + (update_bias - update_bias.detach()), weight, bias)
    return total, normed.to(update.dtype)


def check_norm(ours: list, inputs: list[Tensor], weights: list[Tensor], *skipped: str) -> dict[str, Tensor]:
    """Compare results but those `skipped` with float64; returns the true ones by name."""
    dtype = inputs[1].dtype
    truth, usual = results(plain, double(inputs), *weights), results(plain, inputs, *weights)
    # These gradients are float32, but computed from a norm that was rounded to `dtype`.
    bounds = {"x": 1e-3, "weight": torch.finfo(dtype).eps} if dtype == torch.bfloat16 else {}
    for name, value, true, of_torch in zip(NAMES, ours, truth, usual, strict=True):
        if name in skipped:
            continue
        if name in bounds:
            assert relative(value, true) < bounds[name]
        else:
            assert_close(value, true, of_torch)
    return dict(zip(NAMES, truth, strict=True))


@pytest.mark.parametrize(("size", "dtype"), pairs(SIZES, DTYPES))
def test_sum_and_norm(backend, size, dtype):
    inputs, weights = problem(*size, dtype)
    ours = results(add_norm, inputs, *weights)
    # The norm of one value is its bias; some gradients are rounding errors only.
    check_norm(ours, inputs, weights, *(("x", "update", "weight") if size[1] == 1 else ()))
    assert ours[1].dtype == dtype


@pytest.mark.parametrize(("dtype", "used"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 1)])
def test_an_unused_output(backend, dtype, used):
    """The stream after the last block is not used."""
    inputs, weights = problem(13, 64, dtype)
    leaves = [y.detach().requires_grad_() for y in inputs]
    outs = add_norm(*leaves)
    grads = torch.autograd.grad(outs[used], leaves, weights[used], allow_unused=True, materialize_grads=True)
    weights[1 - used].zero_()
    check_norm([*outs, *grads], inputs, weights)


def test_not_contiguous_and_another_dtype(backend):
    inputs, _ = problem(11, 48, torch.float32)
    expected = add_norm(*inputs)
    assert_equal(add_norm(*(strided(y) for y in inputs)), expected)
    _, rounded = add_norm(*inputs, dtype=torch.bfloat16)
    assert torch.equal(rounded, expected[1].bfloat16())


def test_a_constant_row_has_no_variance(backend):
    (x, update, *more), _ = problem(3, 64, torch.float32)
    x[1], update[1] = 1000.0, 0.0
    _, normed = add_norm(x, update, *more)
    assert torch.equal(normed[1], more[-1])


@pytest.mark.parametrize("least", [0.0, -1e-6, 1e-4])
def test_weights_near_0_give_finite_gradients(backend, least):
    inputs, weights = problem(13, 64, torch.bfloat16)
    inputs[3][::2] = least
    ours = results(add_norm, inputs, *weights)
    assert all(x.isfinite().all() for x in ours)
    truth = check_norm(ours, inputs, weights, "x", "update", "update_bias", "weight")
    assert relative(ours[2], truth["x"]) < 0.1
    assert relative(ours[5][1::2], truth["weight"][1::2]) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("needed", [(0,), (1, 2), (3, 4), (2,)])
def test_frozen_inputs(backend, needed):
    inputs, weights = problem(13, 64, torch.float32)
    check_frozen(add_norm, inputs, weights, needed, (), 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_contracts(backend, dtype):
    inputs = [y.clone().requires_grad_() for y in problem(7, 32, dtype)[0]]
    torch.library.opcheck(torch.ops.fastmum.add_norm.default, (*inputs, 1e-5, dtype))
    x, update, _, weight, bias = (y.detach() for y in inputs)
    rstd = torch.rand(7, 1, device=DEVICE)
    for grad_total in (x.clone(), None):
        args = grad_total, update, update.clone(), rstd, weight, bias, torch.float32, dtype
        torch.library.opcheck(torch.ops.fastmum.add_norm_backward.default, args)


def test_compiles_in_one_graph():
    inputs, weights = problem(7, 32, torch.float32)
    check_compiles(add_norm, inputs, *weights)


def test_refuses():
    args = {"x": torch.zeros(4, 8), "update": torch.zeros(4, 8)}
    args |= {name: torch.zeros(8) for name in ("update_bias", "weight", "bias")}
    changes = {"x": torch.zeros(4, 8, dtype=torch.int64), "update_bias": torch.zeros(8, dtype=torch.bfloat16)}
    assert_refuses(add_norm, args, TypeError, **changes)
    changes = {"update": torch.zeros(4, 7), "update_bias": torch.zeros(7), "weight": torch.zeros(2, 4)}
    assert_refuses(add_norm, args, ValueError, **changes)

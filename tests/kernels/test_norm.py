"""add_norm and its gradients against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICE, assert_close, guarded, relative, strided

from fastmum.kernels import add_norm, reference

SIZES = [(1, 1), (37, 48), (5, 199), (130, 64), (3, 769), (9, 1024)]  # tokens, width


def problem(T: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x float32; update and its bias in a dtype; weight and bias of the norm."""
    x, update = torch.randn(T, D, device=DEVICE), torch.randn(T, D, device=DEVICE).to(dtype)
    weight, bias = 1 + 0.1 * torch.randn(D, device=DEVICE), torch.randn(D, device=DEVICE)
    return tuple(guarded(y) for y in (x, update, torch.randn(D, device=DEVICE).to(dtype), weight, bias))


def results(function, inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Both outputs, and the gradients of all inputs for the sum of both, weighted."""
    inputs = [y.detach().requires_grad_() for y in inputs]
    outs = function(*inputs)
    loss = sum((out * weight.to(out.dtype)).sum() for out, weight in zip(outs, weights, strict=True))
    return [*(out.detach() for out in outs), *torch.autograd.grad(loss, inputs)]


def plain(x, update, update_bias, weight, bias):
    """The bias is in the update: what flows to the one flows to the other."""
    return reference.add_norm(x, update + (update_bias - update_bias.detach()), weight, bias)


def torch_plain(x, update, update_bias, weight, bias):
    """The same as PyTorch does it in the dtypes that come."""
    total = x + (update + (update_bias - update_bias.detach()))
    return total, torch.nn.functional.layer_norm(total, weight.shape, weight, bias).to(update.dtype)


def assert_all_close(ours: list, truth: list, usual: list, dtype: torch.dtype) -> None:
    """Outputs and gradients; those of x and weight are float32, found from a norm that was rounded to `dtype`."""
    for i, (value, true, of_torch) in enumerate(zip(ours, truth, usual, strict=True)):
        if dtype == torch.bfloat16 and i in (2, 5):
            # A gradient that comes in bfloat16 is as far from the truth: 1.7e-3.
            assert relative(value, true) < {2: 1e-3, 5: torch.finfo(dtype).eps}[i]
        else:
            assert_close(value, true, of_torch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_sum_and_norm(backend: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = problem(*size, dtype)
    weights = [torch.randn(size, device=DEVICE), torch.randn(size, device=DEVICE).to(dtype)]
    ours = results(add_norm, inputs, weights)
    truth = results(plain, [y.double() for y in inputs], [y.double() for y in weights])
    usual = results(torch_plain, inputs, weights)
    if size[1] == 1:  # the norm of one value is its bias, and rounding errors are all there is of some gradients
        for x in (ours, truth, usual):
            x[2], x[3], x[5] = x[0], x[0], x[0]
    assert_all_close(ours, truth, usual, dtype)
    assert ours[1].dtype == dtype


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_output_is_not_used(backend: str, dtype: torch.dtype, used: int) -> None:
    """Behind the last block nobody looks at the stream."""
    inputs = problem(13, 64, dtype)
    weights = [torch.randn(13, 64, device=DEVICE).to(dtype) for _ in range(2)]
    leaves = [y.detach().requires_grad_() for y in inputs]
    out = add_norm(*leaves)[used]
    loss = (out * weights[used].to(out.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    weights[1 - used] = torch.zeros_like(weights[used])
    truth = results(plain, [y.double() for y in inputs], [y.double() for y in weights])
    usual = results(torch_plain, inputs, weights)
    assert_all_close([*truth[:2], *grads], truth, [*truth[:2], *usual[2:]], dtype)


def test_not_contiguous_and_another_dtype(backend: str) -> None:
    x, update, update_bias, weight, bias = problem(11, 48, torch.float32)
    expected = add_norm(x, update, update_bias, weight, bias)
    ours = add_norm(strided(x), strided(update), strided(update_bias), strided(weight), strided(bias))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    _, rounded = add_norm(x, update, update_bias, weight, bias, dtype=torch.bfloat16)
    assert torch.equal(rounded, expected[1].bfloat16())


def test_a_constant_row_has_no_variance(backend: str) -> None:
    x, update, update_bias, weight, bias = problem(3, 64, torch.float32)
    x[1], update[1] = 1000.0, 0.0
    _, normed = add_norm(x, update, update_bias, weight, bias)
    assert torch.equal(normed[1], bias)


@pytest.mark.parametrize("least", [0.0, -1e-6, 1e-4])
def test_a_weight_that_is_nearly_0_gives_no_infinite_gradient(backend: str, least: float) -> None:
    inputs = [y.clone() for y in problem(13, 64, torch.bfloat16)]
    inputs[3][::2] = least
    weights = [torch.randn(13, 64, device=DEVICE).bfloat16() for _ in range(2)]
    ours = results(add_norm, inputs, weights)
    usual = results(torch_plain, inputs, weights)
    truth = results(plain, [y.double() for y in inputs], [y.double() for y in weights])
    assert all(x.isfinite().all() for x in ours)
    assert relative(ours[2], truth[2]) < 0.1
    for x in (ours, truth, usual):
        x[2], x[3], x[4], x[5] = x[0], x[0], x[0], x[5][1::2]  # of the other weights
    assert_all_close(ours, truth, usual, torch.bfloat16)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70), st.integers(2, 300))
def test_any_shape(T: int, D: int) -> None:
    inputs = problem(T, D, torch.float32)
    weights = [torch.randn(T, D, device=DEVICE) for _ in range(2)]
    truth = results(plain, [y.double() for y in inputs], [y.double() for y in weights])
    with pytest.MonkeyPatch.context() as patch:
        for backend in ("torch", "triton"):
            patch.setenv("FASTMUM_KERNELS", backend)
            for value, true in zip(results(add_norm, inputs, weights), truth, strict=True):
                torch.testing.assert_close(value.double(), true, rtol=2e-4, atol=2e-4)


def test_the_same_twice(backend: str) -> None:
    inputs = problem(200, 96, torch.bfloat16)
    weights = [torch.randn(200, 96, device=DEVICE) for _ in range(2)]
    first, second = (results(add_norm, inputs, weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_contracts(backend: str, dtype: torch.dtype) -> None:
    inputs = [y.clone().requires_grad_() for y in problem(7, 32, dtype)]
    torch.library.opcheck(torch.ops.fastmum.add_norm.default, (*inputs, 1e-5, dtype))
    x, update, _, weight, bias = (y.detach() for y in inputs)
    rstd = torch.rand(7, 1, device=DEVICE)
    for grad_total in (x.clone(), None):
        args = grad_total, update, update.clone(), rstd, weight, bias, torch.float32, dtype
        torch.library.opcheck(torch.ops.fastmum.add_norm_backward.default, args)


def test_reference_gradcheck() -> None:
    inputs = [y.double().requires_grad_() for y in problem(3, 4, torch.float32)]
    del inputs[2]
    assert torch.autograd.gradcheck(reference.add_norm, inputs)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_in_one_graph(autocast: bool) -> None:
    inputs = problem(7, 32, torch.float32)
    weights = [torch.randn(7, 32, device=DEVICE) for _ in range(2)]
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        compiled = results(torch.compile(add_norm, fullgraph=True, backend="aot_eager"), inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip(compiled, results(add_norm, inputs, weights), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "floating point"),
        ({"update": torch.zeros(4, 7)}, ValueError, "both must be"),
        ({"update_bias": torch.zeros(7)}, ValueError, "update_bias has 7"),
        ({"update_bias": torch.zeros(8, dtype=torch.bfloat16)}, TypeError, "holds the bias"),
        ({"weight": torch.zeros(2, 4)}, ValueError, r"\(D,\)"),
        ({"bias": torch.zeros(9)}, ValueError, "bias has 9"),
        ({"weight": torch.zeros(8, device="meta")}, ValueError, "one device"),
    ],
)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    args = {"x": torch.zeros(4, 8), "update": torch.zeros(4, 8)}
    args |= {name: torch.zeros(8) for name in ("update_bias", "weight", "bias")}
    with pytest.raises(error, match=message):
        add_norm(**args | change)

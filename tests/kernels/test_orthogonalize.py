"""Muon's kernels against float64: symmetric products, orthogonalization, momentum, update of the weights."""

import pytest
import torch
from asserts import assert_close, assert_equal, assert_refuses, relative
from support import DEVICE, DTYPES, guarded, pairs, strided

import fastmum.kernels.matmul as matmul
import fastmum.kernels.symmetric as symmetric
from benchmarks import kernel_reference as reference
from fastmum.kernels import muon, orthogonalize, symmetric_product
from fastmum.kernels.adamw import Halves, join
from fastmum.kernels.muon import NEWTON_SCHULZ, POLAR_EXPRESS, apply_, momentum_
from fastmum.kernels.total_norm import CHUNK

BF16, FP32 = torch.bfloat16, torch.float32
# The last have several rows of tiles, of 128 in bfloat16 and 64 in float32.
SIZES = [(1, 1, 1), (3, 37, 5), (2, 16, 130), (2, 300, 70)]
LAYOUTS = {"plain": guarded, "transposed": lambda x: guarded(x.mT.contiguous()).mT, "strided": strided}
SHAPES = [(1,), (37, 5), (2, 3, 4, 4), (CHUNK + 3,), (16, 32)]
BETA = 0.9
# Values of the polynomials from 0.04 or 5e-4 to 1 / 1.01, by ratio of singular values.
POLAR_BANDS = {0.1: (0.87, 1.124), 1e-3: (0.12, 1.124)}
SCHULZ_BANDS = {0.1: (0.68, 1.135), 1e-3: (0.24, 1.21)}


@pytest.mark.parametrize(("size", "layout", "dtype", "add"), pairs(SIZES, list(LAYOUTS), DTYPES, [True, False, False]))
def test_symmetric_product(backend, size, layout, dtype, add):
    n, r, _ = size
    x = LAYOUTS[layout](torch.randn(size, device=DEVICE).to(dtype))
    term = torch.randn(n, r, r, device=DEVICE).to(dtype)
    args = (0.7, guarded(term + term.mT), -2.5) if add else (0.7,)
    found = symmetric_product(x, *args)
    truth = 0.7 * x.double() @ x.double().mT + (args[2] * args[1].double() if add else 0)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert_close(found, truth, truth.to(dtype))


def test_products_of_the_library(monkeypatch):
    x = torch.randn(2, 20, 30)
    for name, value in (
        ("use_triton", lambda x: True),
        ("products_choice", lambda: "library"),
        ("_symmetric_triton", None),
    ):
        monkeypatch.setattr(symmetric, name, value)
    assert torch.equal(symmetric_product(x), x @ x.mT)


def test_slow_bfloat16(monkeypatch):
    """On CPUs without instructions for it products are float32, and rounded once."""
    monkeypatch.setattr(matmul, "SLOW_BFLOAT16", True)
    x = torch.randn(2, 20, 30).to(BF16)
    assert torch.equal(symmetric_product(x), (x.float() @ x.float().mT).to(BF16))
    assert torch.equal(orthogonalize(x, POLAR_EXPRESS), orthogonalize(x.float(), POLAR_EXPRESS).to(BF16))


def stack(shape: tuple[int, int, int], least: float) -> torch.Tensor:
    """Matrices with singular values from `least` to 1, evenly spaced in the logarithm, at different scales."""
    u, s, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = least ** torch.linspace(0, 1, s.shape[1], dtype=s.dtype)
    return (u * s @ v * torch.tensor([1e-6, 1.0, 1e6], dtype=s.dtype)[: len(u), None, None]).to(DEVICE)


@pytest.mark.parametrize(
    ("shape", "coefficients", "dtype"),
    pairs([(3, 24, 24), (2, 20, 70), (2, 70, 20)], [POLAR_EXPRESS, NEWTON_SCHULZ], DTYPES),
)
@pytest.mark.parametrize("least", [0.1, 1e-3])
def test_orthogonalize(backend, shape, coefficients, dtype, least):
    """Singular values are those of the polynomials; well-conditioned matrices come near the polar factor."""
    x = stack(shape, least).to(dtype)
    found = orthogonalize(x, coefficients)
    truth = reference.polar_steps(x.double(), coefficients)
    assert found.dtype == dtype
    assert relative(found, truth) < (1e-4 if dtype == FP32 else 0.06 if least == 0.1 else 0.15)
    low, high = (POLAR_BANDS if coefficients is POLAR_EXPRESS else SCHULZ_BANDS)[least]
    values, slack = torch.linalg.svdvals(found.double()), 1e-3 if dtype == FP32 else 0.02
    assert low - slack < values.min()
    assert values.max() < high + slack
    if (coefficients, least) == (POLAR_EXPRESS, 0.1):
        u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
        assert relative(found, u @ v) < 0.1


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("coefficients", [POLAR_EXPRESS, NEWTON_SCHULZ])
def test_small_singular_values(monkeypatch, coefficients, dtype):
    """Steps that share a Gram matrix are as exact as single ones where it has small eigenvalues or none."""
    monkeypatch.setattr(matmul, "SLOW_BFLOAT16", False)
    x = torch.cat([stack((2, 64, 256), 1e-6), stack((1, 64, 256), 0.5)]).to(dtype)
    x[2, 8:] = x[2, :8].repeat(7, 1)
    truth = reference.polar_steps(x.double(), coefficients)
    together = relative(orthogonalize(x, coefficients), truth)
    monkeypatch.setattr(muon, "steps_together", lambda x: 1)
    single = relative(orthogonalize(x, coefficients), truth)
    assert together < (1.3 * single if dtype == BF16 else 1e-4)


def test_matrices_of_zeros_and_pieces(backend, monkeypatch):
    x = torch.randn(5, 12, 20, device=DEVICE)
    x[2] = 0
    whole = orthogonalize(x, POLAR_EXPRESS)
    assert not whole[2].any()
    assert whole.isfinite().all()
    monkeypatch.setattr(muon, "CPU_PIECE", 2 * 12 * 20)
    torch.testing.assert_close(orthogonalize(x, POLAR_EXPRESS), whole, rtol=1e-4, atol=1e-5)


def filled(make, dtype: torch.dtype = FP32) -> list[torch.Tensor]:
    """A tensor of every shape, the third channels-last, the last not aligned."""
    made = [make(shape, device=DEVICE).to(dtype) for shape in SHAPES]
    made[2] = made[2].to(memory_format=torch.channels_last)
    made[4] = torch.empty(1 + made[4].numel(), dtype=dtype, device=DEVICE)[1:].view(SHAPES[4]).copy_(made[4])
    return made


@pytest.mark.parametrize(
    ("grad_dtype", "update_dtype", "found_inf"), [(BF16, BF16, None), (FP32, BF16, 0.0), (BF16, None, 0.0)]
)
def test_momentum(backend, grad_dtype, update_dtype, found_inf):
    momenta, grads = filled(torch.randn), filled(torch.randn, grad_dtype)
    updates = filled(torch.empty, update_dtype) if update_dtype else []
    truth = [reference.muon_momentum(m.double(), g.double(), BETA) for m, g in zip(momenta, grads, strict=True)]
    momentum_(momenta, grads, updates, BETA, None if found_inf is None else torch.tensor(found_inf, device=DEVICE))
    assert max(relative(m, true) for m, (true, _) in zip(momenta, truth, strict=True)) < 1e-6
    for update, (_, true) in zip(updates, truth, strict=False):
        assert_close(update, true, true.to(update_dtype))


def weights_of(split: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    weights = filled(torch.randn)
    return tuple(map(list, zip(*map(Halves.of, weights), strict=True))) if split else (weights, [])


@pytest.mark.parametrize(("split", "dtype", "found_inf"), [(True, BF16, None), (False, FP32, 0.0), (True, FP32, 0.0)])
def test_apply(backend, split, dtype, found_inf):
    weights, rests = weights_of(split)
    updates, scales = filled(torch.randn, dtype), [0.2, 1.0, 3.5, 1e-4, 7.0]
    before = [join(*halves) for halves in zip(weights, rests, strict=True)] if split else [x.clone() for x in weights]
    apply_(weights, rests, updates, 0.01, scales, 0.1, None if found_inf is None else torch.zeros((), device=DEVICE))
    for i, (old, update, scale) in enumerate(zip(before, updates, scales, strict=True)):
        new = join(weights[i], rests[i]) if split else weights[i]
        truth = old.double() * (1 - 0.01 * 0.1) - 0.01 * scale * update.double()
        assert relative(new - old, truth - old.double()) < 1e-4  # of the change
        assert relative(new, truth) < 1e-6
        assert not split or torch.equal(weights[i], reference.nearest_bfloat16(new))


@pytest.mark.parametrize("split", [True, False])
def test_a_step_that_is_skipped(backend, split):
    """Nothing changes but the updates, which become zero; without `found_inf` NaN arrive in all three."""
    (weights, rests), momenta, updates = weights_of(split), filled(torch.randn), filled(torch.randn, BF16)
    grads = [torch.full_like(x, float("nan"), dtype=BF16) for x in momenta]
    before, one = [x.clone() for x in (*weights, *rests, *momenta)], torch.ones((), device=DEVICE)
    momentum_(momenta, grads, updates, BETA, one)
    assert not any(x.any() for x in updates)
    apply_(weights, rests, [x.float() * float("nan") for x in updates], 0.01, [1.0] * 5, 0.1, one)
    assert_equal([*weights, *rests, *momenta], before)
    momentum_(momenta, grads, updates, BETA)
    apply_(weights, rests, updates, 0.01, [1.0] * 5, 0.1)
    assert all(x.isnan().all() for x in (*weights, *momenta, *updates))


def test_operator_contracts(backend):
    x, ops, found_inf = torch.randn(2, 5, 7, device=DEVICE), torch.ops.fastmum, torch.zeros((), device=DEVICE)
    torch.library.opcheck(ops.symmetric_product.default, (x, 2.0, symmetric_product(x), 0.5))
    made = [[torch.randn(3, 4, device=DEVICE)] for _ in range(3)]
    torch.library.opcheck(ops.momentum_.default, (*made, BETA, found_inf))
    torch.library.opcheck(ops.apply_.default, (made[0], [], made[1], 0.1, [0.2], 0.1, found_inf))


def test_refuses():
    x, zeros = torch.zeros(2, 3, 4), [torch.zeros(3), torch.zeros(4, 2)]
    halves, shorts = [y.to(BF16) for y in zeros], [y.short() for y in zeros]
    changes = [
        ({"x": x[0]}, ValueError, "x has shape"),
        ({"x": x.int()}, TypeError, "x has dtype"),
        ({"add": torch.zeros(2, 3, 4)}, ValueError, "add has shape"),
        ({"add": torch.zeros(2, 3, 3).double()}, TypeError, "add has dtype"),
        ({"alpha": 0.0}, ValueError, "alpha"),
    ]
    assert_refuses(symmetric_product, {"x": x}, changes)
    changes = [
        ({"grads": zeros[:1]}, ValueError, "grads"),
        ({"momenta": halves}, TypeError, "momenta"),
        ({"updates": [zeros[0], halves[1]]}, TypeError, "updates"),
    ]
    assert_refuses(momentum_, {"momenta": zeros, "grads": zeros, "updates": [], "beta": 0.9}, changes)
    changes = [
        ({"rests": shorts}, TypeError, "weights"),
        ({"weights": halves, "rests": halves}, TypeError, "rests"),
        ({"updates": [zeros[0], zeros[1].t()]}, ValueError, "updates"),
        ({"scales": [1.0]}, ValueError, "scales"),
    ]
    rates = {"rate": 0.1, "scales": [1.0, 1.0], "weight_decay": 0.0}
    assert_refuses(apply_, {"weights": zeros, "rests": [], "updates": zeros} | rates, changes)

"""The GELU and its slope for results of 16 bits: every finite value of bfloat16 and float16 against float64."""

import pytest
import torch
from support import DEVICE

from fastmum.kernels.dispatch import jit, launch, tl
from fastmum.kernels.gelu import gelu, gelu_slope

pytest.importorskip("triton")


@jit()
def _both_kernel(x_ptr, gelu_ptr, slope_ptr, SHORT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(gelu_ptr + at, gelu(x, SHORT))
    tl.store(slope_ptr + at, gelu_slope(x, SHORT))


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value(dtype: torch.dtype, short: bool) -> None:
    x = torch.arange(-(1 << 15), 1 << 15, device=DEVICE).to(torch.int16).view(dtype).float()
    x = torch.where(x.abs() <= 6e12, x, 0.0)  # NaN, too
    found, slope = torch.empty_like(x), torch.empty_like(x)
    launch(_both_kernel, (len(x) // 4096,), x, found, slope, SHORT=short, BLOCK=4096, num_warps=4)
    wide = x.double()
    below = torch.special.ndtr(wide)
    truth, true_slope = wide * below, below + wide * (-0.5 * wide * wide).exp() / (2 * torch.pi) ** 0.5
    for value, true, floor, bound in ((found, truth, 1e-4, 7.6e-5), (slope, true_slope, 0.1, 7.1e-5)):
        distance = (value.double() - true).abs() / true.abs().clamp(min=floor)
        assert distance.max() <= (bound if short else 3e-7 / floor)
    large = truth.abs() >= 1e-4
    # An error of at most 0.02 units in the last place moves few values over the middle between two.
    rounded, true = found.bfloat16()[large], truth.bfloat16()[large]
    assert (rounded != true).double().mean() <= 0.01


def test_nan_stays_nan() -> None:
    x = torch.tensor([float("nan"), 0.0], device=DEVICE).repeat(2048)
    found, slope = torch.empty_like(x), torch.empty_like(x)
    launch(_both_kernel, (1,), x, found, slope, SHORT=True, BLOCK=4096, num_warps=4)
    for y in (found, slope):
        assert y.isnan().tolist() == x.isnan().tolist()

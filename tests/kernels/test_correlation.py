"""local_correlation and its gradient against the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from asserts import assert_refuses, check, check_compiles
from support import DEVICE, DTYPES, guarded, pairs, strided

from benchmarks import kernel_reference as reference
from fastmum.kernels import local_correlation
from fastmum.kernels.correlation import _local_correlation

# Pairs, channels, height, width; radius.
SIZES = [((1, 1, 1, 1), 0), ((2, 37, 5, 7), 2), ((1, 8, 3, 4), 7), ((3, 64, 2, 3), 1), ((1, 13, 6, 1), 3)]
SMALL = (2, 16, 4, 5), 1


def problem(shape: tuple[int, ...], radius: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Maps channels last, a warp inside, across the border and far outside, and the weights of the outputs."""
    B, _, H, W = shape
    a, b = (guarded(torch.randn(B, H, W, shape[1], device=DEVICE).to(dtype)).permute(0, 3, 1, 2) for _ in range(2))
    warp = 1.2 * torch.randn(B, 2, H, W, device=DEVICE)
    warp.view(-1)[0] = 1e9
    return a, b, guarded(warp), torch.randn(B, (2 * radius + 1) ** 2, H, W, device=DEVICE).to(dtype)


@pytest.mark.parametrize(("size", "dtype"), pairs(SIZES, DTYPES))
def test_correlation(backend, monkeypatch, size, dtype):
    monkeypatch.setattr("fastmum.kernels.correlation.CHUNK_BYTES", 5000)  # the CPU computes 1 to 78 pixels at once
    shape, radius = size
    a, b, warp, weight = problem(shape, radius, dtype)
    check(
        lambda x: local_correlation(x, b, warp, radius),
        lambda x: reference.local_correlation(x, b.to(x.dtype), warp, radius),
        [a], weight,
    )  # fmt: skip


def test_is_that_of_sampled_features(backend):
    """PyTorch's grid_sample at all positions of the windows; neither b nor the warp gets a gradient."""
    (B, C, H, W), r = SMALL
    a, b, warp, _ = problem(*SMALL, torch.float32)
    warp = (warp / 2).clamp(-2, 2)
    y, x = (torch.linspace(-2 * r / n, 2 * r / n, 2 * r + 1, device=DEVICE) for n in (H, W))
    window = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(1, 1, -1, 2)
    at = (warp.permute(0, 2, 3, 1).reshape(B, H * W, 1, 2) + window).double()
    sampled = F.grid_sample(b.double(), at, align_corners=False).view(B, C, H, W, -1)
    expected = (a.double()[..., None] * sampled).sum(1).permute(0, 3, 1, 2) / C**0.5
    leaves = [each.detach().requires_grad_() for each in (a, b, warp)]
    found = local_correlation(*leaves, r)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    found.sum().backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is leaves[2].grad is None


def test_a_warp_that_is_not_finite_gives_nan_there_only(backend):
    a, b, warp, _ = problem(*SMALL, torch.float32)
    warp = warp.clamp(-1, 1)
    expected = local_correlation(a, b, warp, 1)
    warp[1, 0, 2, 3], warp[0, 1, 0, 0] = float("nan"), float("inf")
    found = local_correlation(a, b, warp, 1)
    assert found[1, :, 2, 3].isnan().all()
    assert found[0, :, 0, 0].isnan().all()
    found[1, :, 2, 3], found[0, :, 0, 0] = expected[1, :, 2, 3], expected[0, :, 0, 0]
    assert torch.equal(found, expected)


def test_strides_and_memory_layouts(backend):
    a, b, warp, _ = problem(*SMALL, torch.float32)
    expected = local_correlation(a, b, warp, 1)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(local_correlation(strided(a), b.contiguous(), strided(warp), 1), expected)


def test_operators(backend):
    """Their schemas, fakes and gradients, and one graph."""
    a, b, warp, weight = problem(*SMALL, torch.float32)
    last = [x.permute(0, 2, 3, 1) for x in (a, b)]
    torch.library.opcheck(_local_correlation, (last[0].clone().requires_grad_(), last[1], warp, 1))
    check_compiles(lambda x: local_correlation(x * x, b, warp, 1), [a], weight)


def test_refuses():
    args = {"a": torch.zeros(2, 4, 3, 5), "b": torch.zeros(2, 4, 3, 5), "warp": torch.zeros(2, 2, 3, 5), "radius": 1}
    changes = {"a": args["a"].long(), "b": args["b"].double(), "warp": args["warp"].half()}
    assert_refuses(local_correlation, args, TypeError, **changes)
    changes = {"a": torch.zeros(4, 3, 5), "b": torch.zeros(2, 4, 3, 6), "warp": torch.zeros(2, 3, 5, 2), "radius": -1}
    assert_refuses(local_correlation, args, ValueError, **changes)

"""Cases of the report: local correlation, in the sizes of RoMa's refiners at 560 px."""

from __future__ import annotations

import torch

from benchmarks.kernel_report.cases import Case, short, zeros
from fastmum.kernels import correlation

STRIDES = {16: (512, 35, 7), 8: (512, 70, 3), 4: (256, 140, 2)}  # channels, side of the map, radius
PAIRS = 8  # of a device


def correlation_case(stride: int, dtype: torch.dtype, backward: bool, pairs: int = PAIRS) -> Case:
    """Maps and warp in, correlations out; or their gradient, a map and the warp in, the other map's gradient out."""
    C, side, radius = STRIDES[stride]
    return sized_case((pairs, side, side, C), radius, dtype, backward)


def sized_case(shape: tuple[int, int, int, int], radius: int, dtype: torch.dtype, backward: bool) -> Case:
    """With maps (B, H, W, C), and the identity as warp."""
    B, H, W, _ = shape
    K = (2 * radius + 1) ** 2
    x, y = ((2 * torch.arange(n, dtype=torch.float32, device=zeros(1, dtype=dtype).device) + 1) / n - 1 for n in (W, H))
    warp = torch.stack(torch.meshgrid(x, y, indexing="xy")).expand(B, -1, -1, -1).contiguous()
    a, b, grad = zeros(*shape, dtype=dtype), zeros(*shape, dtype=dtype), zeros(B, H, W, K, dtype=dtype)
    least = a.nbytes + b.nbytes + warp.nbytes + grad.nbytes
    name = f"local_correlation {'backward' if backward else 'forward'} {H}x{W}x{shape[3]} r={radius} {short(dtype)}"
    if backward:
        call = lambda: correlation._correlate_back_triton(grad, b, warp, radius)  # noqa: E731
        return Case(name, call, ("b", "grad_a"), least)
    return Case(name, lambda: correlation._correlate_triton(a, b, warp, radius), ("a", "b"), least)

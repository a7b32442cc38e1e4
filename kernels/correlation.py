"""Correlation of features of one map with those of another in a window around a warp (RoMa's local correlation).

Legend: B pairs of maps, H W pixels, C channels, r radius, K = (2 r + 1)^2 positions of a window, S = 2 r + 2.

Positions of a window are one pixel apart, so all have the same bilinear weights: products with the S x S pixels around
the warp are computed first, and interpolated afterwards. No sampled feature is stored, memory is that of the output.
"""

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from fastmum.kernels.checks import check_floating, check_tensors
from fastmum.kernels.dispatch import empty, jit, launch, power_of_2, tl, use_triton
from fastmum.kernels.plans import operator, planned

CHUNK_BYTES = 1 << 24  # bytes of indices and products that the CPU holds at once


def local_correlation(a: Tensor, b: Tensor, warp: Tensor, radius: int) -> Tensor:
    """Dot products of each feature of `a` with `b` around its warped position, over sqrt(C); `b` is 0 outside.

    Returns (B, K, H, W), channels last, in the dtype of `a`: windows row by row, sampled bilinearly (align_corners
    False), summed in float32 at least. A warp that is not finite gives NaN. Only `a` gets a gradient, as in RoMa.
    TypeError or ValueError: a dtype, shape or device that is not allowed.

    Args:
        a, b: (B, C, H, W) floating point of one dtype, any strides; channels last is not copied.
        warp: (B, 2, H, W) float32 or float64, x and y in `b`, in [-1, 1] from edge to edge.
        radius: r, at least 0.
    """
    check_tensors(a=a, b=b, warp=warp)
    check_floating("a", a, 4, "(B, C, H, W)")
    check_floating("b", b, 4, "(B, C, H, W)")
    if b.dtype != a.dtype:
        raise TypeError(f"b has dtype {b.dtype}, but must have that of a, {a.dtype}")
    if b.shape != a.shape:
        raise ValueError(f"b has shape {tuple(b.shape)}, but must have that of a, {tuple(a.shape)}")
    if warp.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"warp has dtype {warp.dtype}, but must be float32 or float64")
    if warp.shape != (len(a), 2, *a.shape[2:]):
        raise ValueError(f"warp has shape {tuple(warp.shape)}, but must be {(len(a), 2, *a.shape[2:])}")
    if radius < 0:
        raise ValueError(f"radius is {radius}, but must be at least 0")
    a, b = (x.permute(0, 2, 3, 1) for x in (a, b.detach()))
    return _local_correlation(a, b, warp.detach(), radius).permute(0, 3, 1, 2)


@operator("local_correlation")
def _local_correlation(a: Tensor, b: Tensor, warp: Tensor, radius: int) -> Tensor:
    """Maps (B, H, W, C) -> (B, H, W, K)."""
    a, b, warp = a.contiguous(), b.contiguous(), warp.contiguous()
    if use_triton(a):
        return _correlate_triton(a, b, warp, radius)
    return _correlate_torch(a, b, warp, radius)


@register_fake(_local_correlation)
def _(a, b, warp, radius):
    return a.new_empty((*a.shape[:3], (2 * radius + 1) ** 2))


@operator("local_correlation_backward")
def _local_correlation_backward(grad: Tensor, b: Tensor, warp: Tensor, radius: int) -> Tensor:
    grad, b, warp = grad.contiguous(), b.contiguous(), warp.contiguous()
    if use_triton(grad):
        return _correlate_back_triton(grad, b, warp, radius)
    return _correlate_back_torch(grad, b, warp, radius)


register_fake(_local_correlation_backward, lambda grad, b, *_: b.new_empty(b.shape))


def _setup_context(ctx, inputs, output):
    _, b, warp, ctx.radius = inputs
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(b, warp)


def _backward(ctx, grad):
    needed = ctx.needs_input_grad[0]
    return _local_correlation_backward(grad, *ctx.saved_tensors, ctx.radius) if needed else None, None, None, None


register_autograd(_local_correlation, _backward, setup_context=_setup_context)


def _correlate_torch(a: Tensor, b: Tensor, warp: Tensor, radius: int) -> Tensor:
    """The CPU's implementation: dot products are the gradient of an embedding bag's weights, which gathers nothing."""
    work, side = torch.promote_types(a.dtype, torch.float32), 2 * radius + 2
    a_PC, b_PC = (x.flatten(0, 2).to(work) for x in (a, b))
    parts = []
    for pixels, index, inside, fx, fy in _windows(warp.to(work), radius):
        bags = torch.arange(len(index), device=a.device).repeat_interleave(side * side)
        starts = torch.arange(0, len(bags), side * side, device=a.device)
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            a_PC[pixels], b_PC, index.flatten(), starts, bags, 0
        )
        x = products.view(inside.shape).masked_fill_(~inside, 0)
        x = torch.lerp(x[:, :, :-1], x[:, :, 1:], fx)
        x = torch.lerp(x[:, :-1], x[:, 1:], fy)
        parts.append(x.flatten(1))
    return torch.cat(parts).mul_(a.shape[3] ** -0.5).view(*a.shape[:3], -1).to(a.dtype)


def _correlate_back_torch(grad: Tensor, b: Tensor, warp: Tensor, radius: int) -> Tensor:
    work, K = torch.promote_types(grad.dtype, torch.float32), 2 * radius + 1
    grad_PKK, b_PC = grad.reshape(-1, K, K).to(work) * b.shape[3] ** -0.5, b.flatten(0, 2).to(work)
    parts = []
    for pixels, index, inside, fx, fy in _windows(warp.to(work), radius):
        g, x = grad_PKK[pixels], torch.zeros(inside.shape, dtype=work, device=grad.device)
        for dy, weight_y in ((0, 1 - fy), (1, fy)):
            for dx, weight_x in ((0, 1 - fx), (1, fx)):
                x[:, dy : dy + K, dx : dx + K].addcmul_(g, weight_y * weight_x)
        x.masked_fill_(~inside, 0)
        parts.append(_weighted_sums(b_PC, index.flatten(1), x.flatten(1)))
    return torch.cat(parts).view(b.shape).to(b.dtype)


def _weighted_sums(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)


def _windows(warp: Tensor, radius: int):
    """Chunks of pixels: their range; rows of `b` (n, S, S); which are inside `b`; weights of the second of two pixels.

    Rows of pixels outside are 0.
    """
    B, _, H, W = warp.shape
    shifts = torch.arange(-radius, radius + 2, device=warp.device)
    first_B = torch.arange(0, B * H * W, H * W, device=warp.device).repeat_interleave(H * W)
    x_P, y_P = (((warp[:, i].flatten() + 1) * n - 1) / 2 for i, n in enumerate((W, H)))
    step = max(1, CHUNK_BYTES // (16 * len(shifts) ** 2))
    for start in range(0, B * H * W, step):
        x, y, first = (each[start : start + step, None, None] for each in (x_P, y_P, first_B))
        left, top = x.floor(), y.floor()
        column = left.nan_to_num(-W).clamp(-2 * radius - W, 2 * W + radius).long() + shifts
        row = top.nan_to_num(-H).clamp(-2 * radius - H, 2 * H + radius).long() + shifts[:, None]
        inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
        index = torch.where(inside, first + row * W + column, 0)
        yield slice(start, start + len(x)), index, inside, x - left, y - top


@planned
def _correlate_triton(a: Tensor, b: Tensor, warp: Tensor, radius: int) -> Tensor:
    B, H, W, C = a.shape
    out = empty(B, H, W, (2 * radius + 1) ** 2, dtype=a.dtype, device=a.device)
    args = a, b, warp, out, H, W, C**-0.5
    launch(_correlation_kernel, (B * H * W,), *args, **_blocks(C, radius))
    return out


@planned
def _correlate_back_triton(grad: Tensor, b: Tensor, warp: Tensor, radius: int) -> Tensor:
    B, H, W, C = b.shape
    grad_a = empty(B, H, W, C, dtype=b.dtype, device=b.device)
    args = grad, b, warp, grad_a, H, W, C**-0.5
    launch(_correlation_backward_kernel, (B * H * W,), *args, **_blocks(C, radius))
    return grad_a


def _blocks(C: int, radius: int) -> dict[str, int]:
    """A program has a pixel: 64 values per thread of the S x S pixels around its warp, and some of their channels."""
    side = power_of_2(2 * radius + 2)
    block = max(8, min(power_of_2(C), 8192 // side**2, 64))
    num_warps = max(1, min(4, side**2 * block // 2048))
    return {"C": C, "RADIUS": radius, "SIDE": side, "BLOCK_C": block, "num_warps": num_warps}


@jit(do_not_specialize=["H", "W"])
def _correlation_kernel(
    a_ptr,  # (B, H, W, C)
    b_ptr,  # (B, H, W, C)
    warp_ptr,  # (B, 2, H, W)
    out_ptr,  # (B, H, W, K)
    H, W,
    scale,  # C ** -0.5
    C: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0)
    row, inside, across, down = _window(warp_ptr, pixel, H, W, RADIUS, SIDE)
    total = tl.zeros((SIDE * SIDE, BLOCK_C), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        a = tl.load(a_ptr + pixel.to(tl.int64) * C + c, mask=c < C, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + row[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        total += b.to(tl.float32) * a[None, :]
    x = tl.reshape(tl.sum(total, axis=1), (SIDE, SIDE))
    x = tl.sum(x[:, :, None] * across[None, :, :], axis=1)
    x = tl.sum(x[:, None, :] * down[:, :, None], axis=0) * scale
    i, k = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    K: tl.constexpr = 2 * RADIUS + 1
    at = pixel.to(tl.int64) * (K * K) + i * K + k
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=(i < K) & (k < K))


@jit(do_not_specialize=["H", "W"])
def _correlation_backward_kernel(
    grad_ptr,  # (B, H, W, K)
    b_ptr,  # (B, H, W, C)
    warp_ptr,  # (B, 2, H, W)
    grad_a_ptr,  # (B, H, W, C)
    H, W,
    scale,  # C ** -0.5
    C: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0)
    row, inside, across, down = _window(warp_ptr, pixel, H, W, RADIUS, SIDE)
    i, k = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    K: tl.constexpr = 2 * RADIUS + 1
    at = pixel.to(tl.int64) * (K * K) + i * K + k
    g = tl.load(grad_ptr + at, mask=(i < K) & (k < K), other=0.0).to(tl.float32)
    g = tl.sum(g[:, None, :] * across[None, :, :], axis=2)
    g = tl.sum(g[None, :, :] * down[:, :, None], axis=1) * scale
    weight = tl.reshape(g, (SIDE * SIDE,))
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        b = tl.load(b_ptr + row[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        x = tl.sum(b.to(tl.float32) * weight[:, None], axis=0)
        tl.store(grad_a_ptr + pixel.to(tl.int64) * C + c, x.to(grad_a_ptr.dtype.element_ty), mask=c < C)


@jit()
def _window(warp_ptr, pixel, H, W, RADIUS: tl.constexpr, SIDE: tl.constexpr):
    """Rows of `b` around the warp of a pixel (SIDE * SIDE,), which are inside, and weights (SIDE, SIDE) along x and y.

    A weight is that of a pixel (first axis) for a position of the window (second axis).
    """
    image = (pixel // (H * W)).to(tl.int64)
    warp_at = image * H * W + pixel  # image * 2 * H * W + pixel % (H * W)
    x = (tl.load(warp_ptr + warp_at).to(tl.float32) + 1) * W * 0.5 - 0.5
    y = (tl.load(warp_ptr + warp_at + H * W).to(tl.float32) + 1) * H * 0.5 - 0.5
    left, top = tl.floor(x), tl.floor(y)
    across, down = _weights(x - left, SIDE), _weights(y - top, SIDE)
    # Far outside is outside; NaN is outside, too, and stays in the weights.
    left = tl.where((left > -4 * SIDE - W) & (left < 2 * W), left, -4.0 * SIDE - W).to(tl.int32)
    top = tl.where((top > -4 * SIDE - H) & (top < 2 * H), top, -4.0 * SIDE - H).to(tl.int32)
    position = tl.arange(0, SIDE * SIDE)
    i, k = position // SIDE, position % SIDE
    r, c = top - RADIUS + i, left - RADIUS + k
    inside = (r >= 0) & (r < H) & (c >= 0) & (c < W) & (i < 2 * RADIUS + 2) & (k < 2 * RADIUS + 2)
    return (image * H + r) * W + c, inside, across, down


@jit()
def _weights(share, SIDE: tl.constexpr):
    """Bilinear weights (SIDE, SIDE) of pixels for positions between a pixel and the next, at `share` of the way."""
    pixel, position = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    return tl.where(pixel == position, 1 - share, 0.0) + tl.where(pixel == position + 1, share, 0.0)

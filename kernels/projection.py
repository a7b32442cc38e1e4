"""The projection to queries, keys and values with rotary positions.

Legend: T tokens, D width, h heads, d = D / h width of a head. The forward kernel is a matrix product that rotates its
tiles in registers: a program computes channels c of some heads and their partners c + d/2. The backward kernel rotates
the gradients of q and k back, packs all three for the matrix products that follow, and sums the bias gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import register_fake
from torch.utils.flop_counter import register_flop_formula

from fastmum.kernels.checks import check_range
from fastmum.kernels.dispatch import ceil_div, empty, jit, launch, power_of_2, tl, use_triton
from fastmum.kernels.matmul import Tiles, fuses_products, product, tile_of
from fastmum.kernels.plans import operator, planned
from fastmum.kernels.rope import _rotate, _rotate_torch, check_rotation
from fastmum.kernels.sums import finish_sums, row_split


def rotary_projection(
    x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, sin: Tensor, cos: Tensor, num_heads: int,
    special: str = "keep", parts: str = "qkv",
) -> tuple[Tensor, ...]:  # fmt: skip
    """x @ weight' + bias with q and k rotated -> q, k, v, or those in `parts`: (T, h, d) each, views of one tensor.

    Args:
        x: (T, C) floating point.
        weight, bias: (3*D, C) and (3*D,) in the dtype of x: rows of q, k and v, or of those in `parts`.
        positions, sin, cos, num_heads, special, parts: as in `rope_qk`, and so are the errors.
    """
    if not x.dtype == weight.dtype == bias.dtype:
        raise TypeError(f"x is {x.dtype}, weight {weight.dtype} and bias {bias.dtype}, but all must be of one dtype")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"x is {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)}, but must be (T, C), "
            f"({len(parts)} * D, C) and ({len(parts)} * D,)"
        )
    sin, cos = check_rotation(len(x), len(weight), positions, sin, cos, num_heads, special, parts)
    return _RotaryProjection.apply(x, weight, bias, positions, sin, cos, num_heads, special == "zero", parts)


class _RotaryProjection(torch.autograd.Function):
    """Rotates the packed tensor in place; autograd sees its parts."""

    @staticmethod
    def forward(ctx, x, weight, bias, positions, sin, cos, heads, zero, parts):
        rotated = len(parts.removesuffix("v"))
        packed = _rotary_linear(x, weight, bias, positions, sin, cos, heads * rotated, zero)
        needs_x, needs_weight, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, positions, sin, cos)
        ctx.settings = rotated, zero
        return packed.unflatten(1, (len(parts), heads, -1)).unbind(1)

    @staticmethod
    def backward(ctx, *grads):
        x, weight, positions, sin, cos = ctx.saved_tensors
        packed, grad_bias = _pack_rotated(list(grads), positions, sin, cos, *ctx.settings)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = product(packed, weight) if needs_x else None
        grad_weight = product(packed.t(), x) if needs_weight else None
        return grad_x, grad_weight, grad_bias if needs_bias else None, *(None,) * 6


@operator("rotary_linear")
def _rotary_linear(
    x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, sin: Tensor, cos: Tensor, rotated: int, zero: bool
) -> Tensor:
    """x @ weight' + bias (T, n * D), its first `rotated` heads rotated."""
    check_range("positions", positions, -1, len(sin))
    if fuses_products(x, "rotary_linear", weight):
        return _rotary_linear_triton(x.contiguous(), weight.contiguous(), bias, positions, sin, cos, rotated, zero)
    packed = product(x, weight.t(), bias)
    _rotate(packed, packed, positions, sin, cos, rotated, zero, False)
    return packed


register_fake(_rotary_linear, lambda x, weight, *_: x.new_empty(len(x), len(weight)))


@register_flop_formula(torch.ops.fastmum.rotary_linear)
def _(x_shape, weight_shape, *_, **__):
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@operator("pack_rotated")
def _pack_rotated(
    grads: Sequence[Tensor], positions: Tensor, sin: Tensor, cos: Tensor, rotated: int, zero: bool
) -> tuple[Tensor, Tensor]:
    """Concatenate gradients (T, h, d) to (T, n * D), the first `rotated` rotated back; and their sum (n * D,)."""
    check_range("positions", positions, -1, len(sin))
    T, heads, width = grads[0].shape
    if use_triton(grads[0]):
        return _pack_triton(positions, sin, cos, rotated, zero, *grads)
    out = torch.empty(T, len(grads) * heads * width, dtype=grads[0].dtype, device=grads[0].device)
    for i, grad in enumerate(grads):
        place = out[:, i * heads * width : (i + 1) * heads * width]
        if i < rotated:
            _rotate_torch(grad.flatten(1), place, positions, sin, cos, heads, zero, True)
        else:
            place.copy_(grad.flatten(1))
    return out, out.sum(0)


@register_fake(_pack_rotated)
def _(grads, positions, sin, cos, rotated, zero):
    T, heads, width = grads[0].shape
    packed = len(grads) * heads * width
    return grads[0].new_empty(T, packed), grads[0].new_empty(packed)


@planned
def _rotary_linear_triton(x, weight, bias, positions, sin, cos, rotated, zero):
    (T, C), width, half = x.shape, len(weight), sin.shape[1]
    packed = empty(T, width, dtype=x.dtype, device=x.device)
    sin, cos = (table if table.stride(1) == 1 else table.contiguous() for table in (sin, cos))
    heads, tiles = width // (2 * half), Tiles(128, 128, 64, num_warps=8)  # two sums take more registers
    BLOCK_C = power_of_2(half)
    BLOCK_H = max(1, tiles.BLOCK_N // (2 * BLOCK_C))
    sizes = T, len(sin), sin.stride(0), cos.stride(0)
    args = x, weight, bias.contiguous(), positions.contiguous(), sin, cos, packed, *sizes
    constants = {"N": width, "K": C, "ROTATED": rotated, "HALF": half, "ZERO": zero}
    constants |= {"BLOCK_H": BLOCK_H, "BLOCK_C": BLOCK_C} | tiles.constants(C, x)
    del constants["BLOCK_N"]
    launch(_rotary_linear_kernel, tiles.grid(T, ceil_div(heads, BLOCK_H)), *args, **constants)
    return packed


@planned
def _pack_triton(positions, sin, cos, rotated, zero, *grads):
    T, heads, width = grads[0].shape
    out = empty(T, len(grads) * heads * width, dtype=grads[0].dtype, device=grads[0].device)
    half = width // 2
    grads = [grad if grad.stride(2) == 1 else grad.contiguous() for grad in grads]
    sin, cos = (x if x.stride(1) == 1 else x.contiguous() for x in (sin, cos))
    BLOCK_C = power_of_2(half)
    BLOCK_H = min(power_of_2(heads), max(1, 128 // BLOCK_C))
    BLOCK_T = max(1, 1024 // (BLOCK_H * BLOCK_C))
    columns = len(grads) * ceil_div(heads, BLOCK_H)
    programs, share = row_split(T, BLOCK_T * max(1, columns // 2), out.device)
    partial = empty(1, programs, out.shape[1], dtype=torch.float32, device=out.device)
    first, second, third = (grads[min(i, len(grads) - 1)] for i in range(3))
    strides = *first.stride()[:2], *second.stride()[:2], *third.stride()[:2], sin.stride(0), cos.stride(0)
    args = first, second, third, positions.contiguous(), sin, cos, out, partial, T, len(sin), share, *strides
    constants = {"PARTS": len(grads), "ROTATED": rotated, "HEADS": heads, "HALF": half, "ZERO": zero}
    blocks = {"BLOCK_T": BLOCK_T, "BLOCK_H": BLOCK_H, "BLOCK_C": BLOCK_C}
    launch(_pack_kernel, (columns, programs), *args, **constants, **blocks, num_warps=4)
    (grad_bias,) = finish_sums(partial, (out.dtype,))
    return out, grad_bias


@jit(do_not_specialize=["M", "positions"])
def _rotary_linear_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,)
    positions_ptr,  # (M,)
    sin_ptr,  # (positions, HALF), rows by the stride
    cos_ptr,
    packed_ptr,  # (M, N)
    M, positions, stride_sin, stride_cos,
    N: tl.constexpr, K: tl.constexpr,
    ROTATED: tl.constexpr,  # heads that are rotated
    HALF: tl.constexpr, ZERO: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = N // (2 * HALF)
    HALVES: tl.constexpr = BLOCK_H * BLOCK_C
    row, column = tile_of(M, (HEADS + BLOCK_H - 1) // BLOCK_H, BLOCK_M, GROUP_M)
    i, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    m = row * BLOCK_M + i
    head, c = column * BLOCK_H + tl.arange(0, HALVES) // BLOCK_C, tl.arange(0, HALVES) % BLOCK_C
    n, exists = head * (2 * HALF) + c, (head < HEADS) & (c < HALF)
    # Two products of the same rows: channels c and c + HALF of the heads.
    x_at = x_ptr + row.to(tl.int64) * (BLOCK_M * K) + (i[:, None] * K + k[None, :])
    weight_at = weight_ptr + (n[None, :] * K + k[:, None])
    a, b = tl.zeros((BLOCK_M, HALVES), tl.float32), tl.zeros((BLOCK_M, HALVES), tl.float32)
    for first in range(0, K, BLOCK_K):
        x_inside, weight_inside = (m < M)[:, None], exists[None, :]
        if not EVEN_K:
            rest = first + k < K
            x_inside, weight_inside = x_inside & rest[None, :], weight_inside & rest[:, None]
        x = tl.load(x_at, mask=x_inside, other=0.0)
        weight_a = tl.load(weight_at, mask=weight_inside, other=0.0)
        weight_b = tl.load(weight_at + HALF * K, mask=weight_inside, other=0.0)
        if WIDEN:
            x, weight_a, weight_b = x.to(tl.float32), weight_a.to(tl.float32), weight_b.to(tl.float32)
        a = tl.dot(x, weight_a, a)
        b = tl.dot(x, weight_b, b)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    dtype: tl.constexpr = packed_ptr.dtype.element_ty
    a += tl.load(bias_ptr + n, mask=exists, other=0.0).to(tl.float32)[None, :]
    b += tl.load(bias_ptr + n + HALF, mask=exists, other=0.0).to(tl.float32)[None, :]
    a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)

    position = tl.load(positions_ptr + m, mask=m < M, other=-1)
    turned = (exists & (head < ROTATED))[None, :]
    has_angle = ((position >= 0) & (position < positions))[:, None] & turned
    # Position -1: the identity, or zero. A position out of range: NaN.
    idle = tl.where(turned, tl.where(position == -1, 0.0 if ZERO else 1.0, float("nan"))[:, None], 1.0)
    sin = tl.load(sin_ptr + position[:, None] * stride_sin + c[None, :], mask=has_angle, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + position[:, None] * stride_cos + c[None, :], mask=has_angle, other=0.0).to(tl.float32)
    cos = tl.where(has_angle, cos, idle)
    inside = (m < M)[:, None] & exists[None, :]
    start, at = row.to(tl.int64) * (BLOCK_M * N), i[:, None] * N + n[None, :]
    tl.store(packed_ptr + start + at, (a * cos - b * sin).to(dtype), mask=inside)
    tl.store(packed_ptr + start + at + HALF, (b * cos + a * sin).to(dtype), mask=inside)


@jit(do_not_specialize=["T", "N", "share"])
def _pack_kernel(
    first_ptr,  # (T, HEADS, 2 * HALF) by the strides, each
    second_ptr, third_ptr,
    positions_ptr,  # (T,)
    sin_ptr,  # (N, HALF), rows by the stride
    cos_ptr,
    out_ptr,  # (T, PARTS * HEADS * 2 * HALF)
    partial_ptr,  # (programs, PARTS * HEADS * 2 * HALF)
    T, N,
    share,  # rows of a program
    first_t, first_h, second_t, second_h, third_t, third_h, stride_sin, stride_cos,
    PARTS: tl.constexpr, ROTATED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    groups: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    part = tl.program_id(0) // groups
    head = (tl.program_id(0) % groups * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
    c = tl.arange(0, BLOCK_C)
    channel = (head < HEADS) & (c < HALF)[None, None, :]
    grad_ptr, stride_t, stride_h = first_ptr, first_t, first_h
    if part == 1:
        grad_ptr, stride_t, stride_h = second_ptr, second_t, second_h
    if part == 2:
        grad_ptr, stride_t, stride_h = third_ptr, third_t, third_h
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, T)
    angles = tl.where(part < ROTATED, N, 0)
    column = (part * HEADS + head) * (2 * HALF) + c[None, None, :]
    sum_a = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_C), tl.float32)
    sum_b = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_C), tl.float32)
    for row in range(begin, end, BLOCK_T):
        t = row + tl.arange(0, BLOCK_T)
        position = tl.load(positions_ptr + t, mask=t < end, other=-1)
        has_angle = ((position >= 0) & (position < angles))[:, None] & (c < HALF)[None, :]
        # Position -1: the identity, or zero. A position out of range: NaN.
        idle = tl.where(position == -1, 0.0 if ZERO else 1.0, float("nan"))[:, None]
        idle = tl.where(part < ROTATED, idle, 1.0)
        sin = tl.load(sin_ptr + position[:, None] * stride_sin + c[None, :], mask=has_angle, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + position[:, None] * stride_cos + c[None, :], mask=has_angle, other=0.0).to(tl.float32)
        sin, cos = sin[:, None, :], tl.where(has_angle, cos, idle)[:, None, :]

        inside = (t < end)[:, None, None] & channel
        token = t.to(tl.int64)[:, None, None]
        at = token * stride_t + head * stride_h + c[None, None, :]
        a = tl.load(grad_ptr + at, mask=inside, other=0.0)
        b = tl.load(grad_ptr + at + HALF, mask=inside, other=0.0)
        x, y = a.to(tl.float32), b.to(tl.float32)
        x, y = (x * cos + y * sin).to(a.dtype), (y * cos - x * sin).to(b.dtype)
        at = token * (PARTS * HEADS * 2 * HALF) + column
        tl.store(out_ptr + at, x, mask=inside)
        tl.store(out_ptr + at + HALF, y, mask=inside)
        sum_a += x.to(tl.float32)
        sum_b += y.to(tl.float32)
    at = tl.program_id(1).to(tl.int64) * (PARTS * HEADS * 2 * HALF) + column
    tl.store(partial_ptr + at, tl.sum(sum_a, axis=0)[None, :, :], mask=channel)
    tl.store(partial_ptr + at + HALF, tl.sum(sum_b, axis=0)[None, :, :], mask=channel)

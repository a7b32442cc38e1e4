"""The residual sum and the layer norm after it.

Legend: T tokens, D width. The residual stream is float32; inputs and outputs of products may be bfloat16.

Fuses sum, mean and variance, normalisation and rounding: the stream is read and written once. The backward pass reads
each tensor once, for the gradients of the stream, the norm's weight and bias, and the bias of the linear layer whose
output was added. It needs the norm's output, which the next product saves anyway, and not the stream. On the CPU,
PyTorch's own operations run, which save the stream.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_autograd, register_fake

from fastmum.kernels.checks import check_floating, check_tensors
from fastmum.kernels.dispatch import ceil_div, empty, jit, launch, power_of_2, tile_bytes, tl, use_triton
from fastmum.kernels.plans import operator, planned
from fastmum.kernels.sums import finish_sums, row_split

LEAST_WEIGHT = 1e-3  # norm weights below this are clamped when backward recovers x_hat = (y - bias) / weight


def add_norm(
    x: Tensor, update: Tensor, update_bias: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + update (T, D) in the dtype of x, and its layer norm (T, D) in `dtype`. Arithmetic is in float32 at least.

    The kernel's backward pass recovers the normalised stream from the norm's output: gradients of weights that are
    nearly 0 are too small. TypeError or ValueError: a dtype, shape or device that is not allowed.

    Args:
        x: (T, D) floating point, the residual stream.
        update: (T, D) floating point, output of a linear layer, including its bias.
        update_bias: (D,) that bias, in the dtype of `update`. Only its gradient is computed here, the sum of the
            gradient of `update`; pass it detached to the linear layer.
        weight, bias: (D,) of the norm.
        eps: added to the variance.
        dtype: of the norm's output; None: that of `update`.
    """
    check_tensors(x=x, update=update, update_bias=update_bias, weight=weight, bias=bias)
    check_floating("x", x, 2, "(T, D)")
    check_floating("update", update, 2, "(T, D)")
    if update.shape != x.shape or not x.shape[1]:
        raise ValueError(f"update has shape {tuple(update.shape)} and x {tuple(x.shape)}, but both must be (T, D)")
    for name, vector in {"update_bias": update_bias, "weight": weight, "bias": bias}.items():
        check_floating(name, vector, 1, "(D,)")
        if len(vector) != x.shape[1]:
            raise ValueError(f"{name} has {len(vector)} values, but x is {x.shape[1]} wide")
    if update_bias.dtype != update.dtype:
        raise TypeError(f"update_bias is {update_bias.dtype}, but update is {update.dtype}, which contains it")
    dtype = dtype or update.dtype
    if not use_triton(x):
        return _add_norm_torch(x, update, update_bias, weight, bias, eps, dtype)
    total, normed, _ = _add_norm(x, update, update_bias, weight, bias, eps, dtype)
    return total, normed


def _add_norm_torch(x, update, update_bias, weight, bias, eps, dtype):
    """PyTorch's own operations: faster on the CPU, but they save the stream."""
    work = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        total = (x + _Biased.apply(update, update_bias)).to(x.dtype)
        normed = F.layer_norm(total.to(work), weight.shape, weight.to(work), bias.to(work), eps)
        return total, normed.to(dtype)


class _Biased(torch.autograd.Function):
    """The identity on an update that includes its bias, with the bias's gradient."""

    @staticmethod
    def forward(ctx, update, update_bias):
        return update.view_as(update)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.sum(0) if ctx.needs_input_grad[1] else None


@operator("add_norm")
@planned
def _add_norm(
    x: Tensor, update: Tensor, update_bias: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    T, D = x.shape
    total = empty(x.shape, dtype=x.dtype, device=x.device)
    normed = empty(x.shape, dtype=dtype, device=x.device)
    rstd = empty(T, 1, dtype=torch.float32, device=x.device)
    BLOCK_D = power_of_2(D)
    BLOCK_T = max(1, tile_bytes(x.device) // (BLOCK_D * x.element_size()))
    args = *(y.contiguous() for y in (x, update, weight, bias)), total, normed, rstd, T, eps
    launch(_add_norm_kernel, (ceil_div(T, BLOCK_T),), *args, D=D, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=4)
    return total, normed, rstd


@register_fake(_add_norm)
def _(x, update, update_bias, weight, bias, eps, dtype):
    work = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), x.new_empty(len(x), 1, dtype=work)


@operator("add_norm_backward")
@planned
def _add_norm_backward(
    grad_total: Tensor | None, grad_normed: Tensor, normed: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    dtype: torch.dtype, update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, update (empty if of x's dtype, as they are equal), weight, bias and update_bias."""
    T, D = normed.shape
    same = update_dtype == dtype
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x = empty(normed.shape, dtype=dtype, device=normed.device)
    grad_update = empty(0 if same else normed.shape, dtype=update_dtype, device=normed.device)
    BLOCK_D = power_of_2(D)
    BLOCK_T = max(1, 2048 // BLOCK_D)  # of each of three tensors in flight
    programs, share = row_split(T, BLOCK_T, normed.device)
    partial = empty(3, programs, D, dtype=torch.float32, device=normed.device)
    inputs = grad_normed.contiguous(), grad_total, normed.contiguous(), rstd, weight.contiguous(), bias.contiguous()
    args = *inputs, grad_x, None if same else grad_update, partial, T, share
    constants = {"LEAST": LEAST_WEIGHT, "D": D, "BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D}
    launch(_add_norm_backward_kernel, (programs,), *args, **constants, num_warps=8)
    return grad_x, grad_update, *finish_sums(partial, (weight.dtype, weight.dtype, update_dtype))


@register_fake(_add_norm_backward)
def _(grad_total, grad_normed, normed, rstd, weight, bias, dtype, update_dtype):
    return (
        normed.new_empty(normed.shape, dtype=dtype),
        normed.new_empty(normed.shape if update_dtype != dtype else 0, dtype=update_dtype),
        *(normed.new_empty(normed.shape[1], dtype=weight.dtype) for _ in range(2)),
        normed.new_empty(normed.shape[1], dtype=update_dtype),
    )


def _setup_context(ctx, inputs, output):
    x, update, _, weight, bias, *_ = inputs
    _, normed, rstd = output
    ctx.save_for_backward(normed, rstd, weight, bias)
    ctx.dtypes = x.dtype, update.dtype
    ctx.set_materialize_grads(False)  # the last sum of a stack is unused


def _backward(ctx, grad_total, grad_normed, _rstd):
    normed, rstd, weight, bias = ctx.saved_tensors
    dtype, update_dtype = ctx.dtypes
    if grad_normed is None:
        grad_normed = torch.zeros_like(normed)
    grads = _add_norm_backward(grad_total, grad_normed, normed, rstd, weight, bias, dtype, update_dtype)
    grad_x, grad_update, grad_weight, grad_bias, grad_update_bias = grads
    grads = grad_x, grad_x if update_dtype == dtype else grad_update, grad_update_bias, grad_weight, grad_bias
    return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None


register_autograd(_add_norm, _backward, setup_context=_setup_context)


@jit(do_not_specialize=["T"])
def _add_norm_kernel(
    x_ptr,  # (T, D)
    update_ptr,  # (T, D)
    weight_ptr,  # (D,)
    bias_ptr,
    total_ptr,  # (T, D)
    normed_ptr,  # (T, D)
    rstd_ptr,  # (T,)
    T, eps,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    inside = (t < T)[:, None] & (d < D)[None, :]
    at = t.to(tl.int64)[:, None] * D + d[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    update = tl.load(update_ptr + at, mask=inside, other=0.0)
    rounded = (x.to(tl.float32) + update.to(tl.float32)).to(x.dtype)
    tl.store(total_ptr + at, rounded, mask=inside)
    total = rounded.to(tl.float32)
    mean = tl.sum(total, axis=1) / D
    centred = tl.where(inside, total - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + t, rstd, mask=t < T)


@jit(do_not_specialize=["T", "share"])
def _add_norm_backward_kernel(
    grad_normed_ptr,  # (T, D)
    grad_total_ptr,  # (T, D), or None
    normed_ptr,  # (T, D)
    rstd_ptr,  # (T,)
    weight_ptr,  # (D,)
    bias_ptr,
    grad_x_ptr,  # (T, D)
    grad_update_ptr,  # (T, D), or None if it equals grad_x
    partial_ptr,  # (3, programs, D): weight, bias, update_bias
    T,
    share,  # rows of a program
    LEAST: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, T)
    d = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    inverse = tl.where(weight < 0, -1.0, 1.0) / tl.maximum(tl.abs(weight), LEAST)
    sum_weight = tl.zeros((BLOCK_D,), tl.float32)
    sum_bias = tl.zeros((BLOCK_D,), tl.float32)
    sum_update = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = (t < end)[:, None] & (d < D)[None, :]
        at = t.to(tl.int64)[:, None] * D + d[None, :]
        normed = tl.load(normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad_normed = tl.load(grad_normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + t, mask=t < end, other=0.0)
        unit = tl.where(inside, (normed - bias[None, :]) * inverse[None, :], 0.0)
        weighted = grad_normed * weight[None, :]
        along = tl.sum(weighted * unit, axis=1) / D
        grad = (weighted - tl.sum(weighted, axis=1)[:, None] / D - unit * along[:, None]) * rstd[:, None]
        if grad_total_ptr is not None:
            grad += tl.load(grad_total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = grad.to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + at, rounded, mask=inside)
        if grad_update_ptr is not None:
            update = rounded.to(grad_update_ptr.dtype.element_ty)
            tl.store(grad_update_ptr + at, update, mask=inside)
            sum_update += tl.sum(tl.where(inside, update.to(tl.float32), 0.0), axis=0)
        else:
            sum_update += tl.sum(tl.where(inside, rounded.to(tl.float32), 0.0), axis=0)
        sum_weight += tl.sum(grad_normed * unit, axis=0)
        sum_bias += tl.sum(grad_normed, axis=0)
    programs = tl.num_programs(0)
    at = tl.program_id(0) * D + d
    tl.store(partial_ptr + at, sum_weight, mask=d < D)
    tl.store(partial_ptr + programs * D + at, sum_bias, mask=d < D)
    tl.store(partial_ptr + 2 * programs * D + at, sum_update, mask=d < D)

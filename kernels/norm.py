"""The residual sum and the layer norm behind it.

Legend: T tokens, D width. The stream of residuals is float32, what products read and give may be bfloat16.

Fuses sum, mean and variance, normalisation and rounding: the stream is read once and written once. The backward pass
reads each tensor once, too: along rows for the gradient of the stream, down the columns for those of norm weight, norm
bias, and of the bias of the linear layer whose output was added, which is the sum of a tensor that this kernel writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmum.kernels.dispatch import (
    ceil_div,
    check_floating,
    check_tensors,
    jit,
    launch,
    power_of_2,
    tile_bytes,
    tl,
    use_triton,
)
from fastmum.kernels.sums import finish_sums, row_split

CHUNK_BYTES = 1 << 20  # of the stream that the CPU works on at once: temporaries stay in the cache


def add_norm(
    x: Tensor,
    update: Tensor,
    update_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x + update, and its layer norm.

    Args:
        x: (T, D) floating point, the stream of residuals.
        update: (T, D) floating point, output of a linear layer, with its bias.
        update_bias: (D,) that bias, in the dtype of `update`, which already holds it. Only its gradient is made here,
            the sum of the gradient of `update`; give it detached to the linear layer.
        weight, bias: (D,) of the norm.
        eps: added to the variance.
        dtype: of the norm's output; None: that of `update`.

    Returns:
        sum (T, D) in the dtype of x, normed (T, D) in `dtype`. Arithmetic is in float32 at least.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, or tensors on different devices.
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
        raise TypeError(f"update_bias is {update_bias.dtype}, but update is {update.dtype}: it holds the bias")
    total, normed, _, _ = _add_norm(x, update, update_bias, weight, bias, eps, dtype or update.dtype)
    return total, normed


@torch.library.custom_op("fastmum::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, update: Tensor, update_bias: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, update = x.contiguous(), update.contiguous()
    if use_triton(x):
        return _add_norm_triton(x, update, weight, bias, eps, dtype)
    work = torch.promote_types(x.dtype, torch.float32)
    total, normed = torch.empty_like(x), torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(len(x), 1, dtype=work, device=x.device) for _ in range(2))
    weight, bias = weight.to(work), bias.to(work)
    step = max(1, CHUNK_BYTES // (x.shape[1] * work.itemsize))
    for x_t, update_t, *outs in zip(*(y.split(step) for y in (x, update, total, normed, mean, rstd)), strict=True):
        total_t = torch.add(x_t, update_t, out=outs[0]).to(work)
        for out, value in zip(outs[1:], torch.native_layer_norm(total_t, x.shape[1:], weight, bias, eps), strict=True):
            out.copy_(value)
    return total, normed, mean, rstd


@_add_norm.register_fake
def _(x, update, update_bias, weight, bias, eps, dtype):
    work = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(len(x), 1, dtype=work) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), mean, rstd


@torch.library.custom_op("fastmum::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of update (empty where its dtype is x's: they are the same), weight, bias and update_bias."""
    grad_normed = grad_normed.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    if use_triton(total):
        return _backward_triton(grad_total, grad_normed, total, mean, rstd, weight, update_dtype)
    work, width = mean.dtype, total.shape[1]
    grad_x = torch.empty_like(total)
    grad_update = total.new_empty(total.shape if update_dtype != total.dtype else 0, dtype=update_dtype)
    sums = [torch.zeros(width, dtype=work, device=total.device) for _ in range(2)]
    step = max(1, CHUNK_BYTES // (width * work.itemsize))
    for first in range(0, len(total), step):
        t = slice(first, first + step)
        grads = torch.ops.aten.native_layer_norm_backward(
            *(grad_normed[t].to(work), total[t].to(work), [width], mean[t], rstd[t], weight.to(work)),
            *(weight.to(work), [True, True, True]),
        )
        for each, grad in zip(sums, grads[1:], strict=True):
            each += grad
        if grad_total is not None:
            torch.add(grads[0], grad_total[t], out=grads[0])
        grad_x[t] = grads[0]
        if update_dtype != total.dtype:
            grad_update[t] = grads[0]
    summed = grad_x if update_dtype == total.dtype else grad_update
    return grad_x, grad_update, *(each.to(weight.dtype) for each in sums), summed.sum(0)


@_add_norm_backward.register_fake
def _(grad_total, grad_normed, total, mean, rstd, weight, update_dtype):
    return (
        total.new_empty(total.shape),
        total.new_empty(total.shape if update_dtype != total.dtype else 0, dtype=update_dtype),
        *(total.new_empty(total.shape[1], dtype=weight.dtype) for _ in range(2)),
        total.new_empty(total.shape[1], dtype=update_dtype),
    )


def _setup_context(ctx, inputs, output):
    _, update, _, weight, *_ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, mean, rstd, weight)
    ctx.update_dtype = update.dtype
    ctx.set_materialize_grads(False)  # the last sum of a stack is not used


def _backward(ctx, grad_total, grad_normed, _mean, _rstd):
    total, mean, rstd, weight = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = torch.zeros_like(total)
    grads = _add_norm_backward(grad_total, grad_normed, total, mean, rstd, weight, ctx.update_dtype)
    grad_x, grad_update, grad_weight, grad_bias, grad_update_bias = grads
    grad_update = grad_x if ctx.update_dtype == total.dtype else grad_update
    return grad_x, grad_update, grad_update_bias, grad_weight, grad_bias, None, None


_add_norm.register_autograd(_backward, setup_context=_setup_context)


def _add_norm_triton(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, D = x.shape
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(T, 1, dtype=torch.float32, device=x.device) for _ in range(2))
    BLOCK_D = power_of_2(D)
    BLOCK_T = max(1, tile_bytes(x.device) // (BLOCK_D * x.element_size()))
    launch(
        _add_norm_kernel,
        (ceil_div(T, BLOCK_T),),
        *(x, update, weight.contiguous(), bias.contiguous(), total, normed, mean, rstd, T, eps),
        D=D,
        BLOCK_T=BLOCK_T,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
    return total, normed, mean, rstd


def _backward_triton(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, D = total.shape
    same = update_dtype == total.dtype
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    grad_update = torch.empty(0 if same else total.shape, dtype=update_dtype, device=total.device)
    BLOCK_D = power_of_2(D)
    BLOCK_T = max(1, 2048 // BLOCK_D)  # three streams of as many values are in flight at once
    programs, share = row_split(T, BLOCK_T, total.device)
    partial = torch.empty(3, programs, D, dtype=torch.float32, device=total.device)
    launch(
        _add_norm_backward_kernel,
        (programs,),
        *(grad_normed, grad_total, total, mean, rstd, weight.contiguous(), grad_x),
        *(None if same else grad_update, partial, T, share),
        D=D,
        BLOCK_T=BLOCK_T,
        BLOCK_D=BLOCK_D,
        num_warps=8,
    )
    return grad_x, grad_update, *finish_sums(partial, (weight.dtype, weight.dtype, update_dtype))


@jit(do_not_specialize=["T"])
def _add_norm_kernel(
    x_ptr,  # (T, D)
    update_ptr,  # (T, D)
    weight_ptr,  # (D,)
    bias_ptr,
    total_ptr,  # (T, D)
    normed_ptr,  # (T, D)
    mean_ptr,  # (T,)
    rstd_ptr,
    T,
    eps,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
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
    tl.store(mean_ptr + t, mean, mask=t < T)
    tl.store(rstd_ptr + t, rstd, mask=t < T)


@jit(do_not_specialize=["T", "share"])
def _add_norm_backward_kernel(
    grad_normed_ptr,  # (T, D)
    grad_total_ptr,  # (T, D), or None
    total_ptr,  # (T, D)
    mean_ptr,  # (T,)
    rstd_ptr,
    weight_ptr,  # (D,)
    grad_x_ptr,  # (T, D)
    grad_update_ptr,  # (T, D), or None where it is the same
    partial_ptr,  # (3, programs, D): weight, bias, bias of the update
    T,
    share,  # rows of a program
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, T)
    d = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK_D,), tl.float32)
    sum_bias = tl.zeros((BLOCK_D,), tl.float32)
    sum_update = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = (t < end)[:, None] & (d < D)[None, :]
        at = t.to(tl.int64)[:, None] * D + d[None, :]
        total = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad_normed = tl.load(grad_normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + t, mask=t < end, other=0.0)
        rstd = tl.load(rstd_ptr + t, mask=t < end, other=0.0)
        unit = tl.where(inside, (total - mean[:, None]) * rstd[:, None], 0.0)
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

"""GELU behind a linear layer, whose bias gradient comes out of the same backward pass.

Legend: T tokens, N hidden width. The gradient of a bias is the sum of the gradient before the GELU over the tokens:
the kernel that writes that gradient adds it up, where otherwise it would be read once more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.kernels.dispatch import ceil_div, check_floating, check_tensors, jit, launch, power_of_2, tl, use_triton
from fastmum.kernels.sums import finish_sums, row_split


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """The exact (erf) GELU of a linear layer's output.

    Args:
        x: (T, N) floating point, with the bias of the layer.
        bias: (N,) that bias. Only its gradient is made here; give it detached to the linear layer.

    Returns:
        (T, N), in the dtype of x; the arithmetic is in float32 at least.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, or tensors on different devices.
    """
    check_tensors(x=x, bias=bias)
    check_floating("x", x, 2, "(T, N)")
    check_floating("bias", bias, 1, "(N,)")
    if len(bias) != x.shape[1]:
        raise ValueError(f"bias has {len(bias)} values, but x is {x.shape[1]} wide")
    return _bias_gelu(x, bias)


@torch.library.custom_op("fastmum::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    x = x.contiguous()
    if not use_triton(x):
        return F.gelu(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    BLOCK = 2048
    launch(_gelu_kernel, (ceil_div(x.numel(), BLOCK),), x, out, x.numel(), BLOCK=BLOCK, num_warps=4)
    return out


@_bias_gelu.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("fastmum::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(grad: Tensor, x: Tensor, bias_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    if use_triton(x):
        return _backward_triton(grad, x, bias_dtype)
    grad_x = torch.ops.aten.gelu_backward(grad, x)
    return grad_x, grad_x.sum(0).to(bias_dtype)


@_bias_gelu_backward.register_fake
def _(grad, x, bias_dtype):
    return x.new_empty(x.shape), x.new_empty(x.shape[1], dtype=bias_dtype)


def _setup_context(ctx, inputs, output):
    x, bias = inputs
    ctx.save_for_backward(x)
    ctx.bias_dtype = bias.dtype


def _backward(ctx, grad):
    return _bias_gelu_backward(grad, *ctx.saved_tensors, ctx.bias_dtype)


_bias_gelu.register_autograd(_backward, setup_context=_setup_context)


def _backward_triton(grad: Tensor, x: Tensor, bias_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    T, N = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    BLOCK_N = min(power_of_2(N), 256)
    BLOCK_T = 2048 // BLOCK_N
    columns = ceil_div(N, BLOCK_N)
    # Programs side by side share the rows' programs out among them: fewer partial sums.
    programs, share = row_split(T, BLOCK_T * max(1, columns // 2), x.device)
    partial = torch.empty(1, programs, N, dtype=torch.float32, device=x.device)
    launch(
        _gelu_backward_kernel,
        (columns, programs),
        *(grad, x, grad_x, partial, T, share),
        N=N,
        BLOCK_T=BLOCK_T,
        BLOCK_N=BLOCK_N,
        num_warps=4,
    )
    (grad_bias,) = finish_sums(partial, (bias_dtype,), via=x.dtype)
    return grad_x, grad_bias


@jit(do_not_specialize=["numel"])
def _gelu_kernel(x_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < numel, other=0.0)
    wide = x.to(tl.float32)
    out = 0.5 * wide * (1.0 + tl.erf(wide * 0.7071067811865476))
    tl.store(out_ptr + at, out.to(x.dtype), mask=at < numel)


@jit(do_not_specialize=["T", "share"])
def _gelu_backward_kernel(
    grad_ptr,  # (T, N)
    x_ptr,  # (T, N)
    grad_x_ptr,  # (T, N)
    partial_ptr,  # (programs, N)
    T,
    share,  # rows of a program
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, T)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for first in range(begin, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = (t < end)[:, None] & (n < N)[None, :]
        at = t.to(tl.int64)[:, None] * N + n[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # of the normal distribution
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        grad_x = (grad.to(tl.float32) * (below + x * density)).to(grad.dtype)
        tl.store(grad_x_ptr + at, grad_x, mask=inside)
        total += grad_x.to(tl.float32)
    at = tl.program_id(1).to(tl.int64) * N + n
    tl.store(partial_ptr + at, tl.sum(total, axis=0), mask=n < N)

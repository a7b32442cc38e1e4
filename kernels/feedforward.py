"""Two linear layers with a GELU between them.

Legend: T tokens, D width, N hidden width. The first product goes through the GELU before it leaves the registers, and
in the backward pass the gradient of the second layer's input does: of the four passes over (T, N) values that the GELU
takes by itself, and the one that sums its bias's gradient, one reading of `hidden` is left.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastmum.kernels.dispatch import ceil_div, check_floating, check_tensors, jit, launch, power_of_2, tl, use_triton
from fastmum.kernels.products import Tiles, fuses_products, product_tile, tile_of
from fastmum.kernels.sums import finish_sums, row_split


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """gelu(x @ weight1' + bias1) @ weight2' + bias2, with the exact (erf) GELU.

    Args:
        x: (T, D) floating point.
        weight1, bias1: (N, D) and (N,), in the dtype of x.
        weight2, bias2: (D, N) and (D,), in the dtype of x. No gradient flows to `bias2`: it is the sum of the gradient
            that comes in, and whoever makes that sums it on the way, see `add_norm`.

    Returns:
        (T, D), in the dtype of x.

    Raises:
        TypeError: dtypes that differ.
        ValueError: a shape that does not fit, or tensors on different devices.
    """
    tensors = {"x": x, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    check_tensors(**tensors)
    check_floating("x", x, 2, "(T, D)")
    if len({y.dtype for y in tensors.values()}) > 1:
        raise TypeError(f"dtypes are {', '.join(f'{k} {y.dtype}' for k, y in tensors.items())}, but must be the same")
    D, N = x.shape[1], weight1.shape[0]
    for name, shape in {"weight1": (N, D), "bias1": (N,), "weight2": (D, N), "bias2": (D,)}.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, but must be {shape}")
    return _Mlp.apply(x, weight1, bias1, weight2, bias2.detach())


class _Mlp(torch.autograd.Function):
    """What is fused in the backward pass is not what is fused in the forward pass."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2):
        hidden, active = _linear_gelu(x, weight1, bias1)
        ctx.save_for_backward(x, weight1, weight2, hidden, active)
        return torch.addmm(bias2, active, weight2.t())

    @staticmethod
    def backward(ctx, grad):
        x, weight1, weight2, hidden, active = ctx.saved_tensors
        grad = grad.contiguous()
        grad_hidden, grad_bias1 = _linear_gelu_backward(grad, weight2, hidden)
        return grad_hidden @ weight1, grad_hidden.t() @ x, grad_bias1, grad.t() @ active, None


@torch.library.custom_op("fastmum::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x @ weight' + bias before and behind the GELU, (T, N) both."""
    if fuses_products(x):
        return _linear_gelu_triton(x.contiguous(), weight.contiguous(), bias)
    hidden = torch.addmm(bias, x, weight.t())
    return hidden, F.gelu(hidden)


@_linear_gelu.register_fake
def _(x, weight, bias):
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight))


@torch.library.custom_op("fastmum::linear_gelu_backward", mutates_args=())
def _linear_gelu_backward(grad: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """grad (T, D) @ weight (D, N), through the GELU: the gradient of hidden (T, N), and its sum over tokens (N,)."""
    if fuses_products(grad):
        return _backward_triton(grad.contiguous(), weight.contiguous(), hidden)
    grad = grad @ weight
    if use_triton(grad):
        return _gelu_backward_triton(grad, hidden)
    grad_hidden = torch.ops.aten.gelu_backward(grad, hidden)
    return grad_hidden, grad_hidden.sum(0)


@_linear_gelu_backward.register_fake
def _(grad, weight, hidden):
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape[1])


@register_flop_formula([torch.ops.fastmum.linear_gelu, torch.ops.fastmum.linear_gelu_backward])
def _(x_shape, weight_shape, *_, **__):
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


def _linear_gelu_triton(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    (T, D), N, tiles = x.shape, len(weight), Tiles()
    hidden, active = (torch.empty(T, N, dtype=x.dtype, device=x.device) for _ in range(2))
    launch(
        _linear_gelu_kernel,
        tiles.grid(T, ceil_div(N, tiles.BLOCK_N)),
        *(x, weight, bias.contiguous(), hidden, active, T),
        N=N,
        K=D,
        **tiles.constants(D, x),
    )
    return hidden, active


def _backward_triton(grad: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    (T, D), N, tiles = grad.shape, weight.shape[1], Tiles()
    grad_hidden = torch.empty(T, N, dtype=grad.dtype, device=grad.device)
    partial = torch.empty(1, ceil_div(T, tiles.BLOCK_M), N, dtype=torch.float32, device=grad.device)
    launch(
        _linear_gelu_backward_kernel,
        tiles.grid(T, ceil_div(N, tiles.BLOCK_N)),
        *(grad, weight, hidden.contiguous(), grad_hidden, partial, T),
        N=N,
        K=D,
        **tiles.constants(D, grad),
    )
    return grad_hidden, *finish_sums(partial, (grad.dtype,))


def _gelu_backward_triton(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    T, N = hidden.shape
    grad_hidden = torch.empty(T, N, dtype=hidden.dtype, device=hidden.device)
    BLOCK_N = min(power_of_2(N), 256)
    BLOCK_T = 2048 // BLOCK_N
    columns = ceil_div(N, BLOCK_N)
    # Programs side by side share the multiprocessors: the more columns, the fewer partial sums of each.
    programs, share = row_split(T, BLOCK_T * max(1, columns // 2), grad.device)
    partial = torch.empty(1, programs, N, dtype=torch.float32, device=grad.device)
    launch(
        _gelu_backward_kernel,
        (columns, programs),
        *(grad.contiguous(), hidden.contiguous(), grad_hidden, partial, T, share),
        N=N,
        BLOCK_T=BLOCK_T,
        BLOCK_N=BLOCK_N,
        num_warps=4,
    )
    return grad_hidden, *finish_sums(partial, (hidden.dtype,))


@jit()
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@jit()
def _gelu_slope(x):
    below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # of the normal distribution
    return below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@jit(do_not_specialize=["M"])
def _linear_gelu_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,)
    hidden_ptr,  # (M, N)
    active_ptr,  # (M, N)
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row, column = tile_of(M, (N + BLOCK_N - 1) // BLOCK_N, BLOCK_M, GROUP_M)
    i, n = tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = product_tile(x_ptr, weight_ptr, row, n, M, n < N, N, K, True, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, WIDEN)
    acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (row * BLOCK_M + i < M)[:, None] & (n < N)[None, :]
    start, at = row.to(tl.int64) * (BLOCK_M * N), i[:, None] * N + n[None, :]
    hidden = acc.to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + start + at, hidden, mask=inside)
    tl.store(active_ptr + start + at, _gelu(hidden.to(tl.float32)).to(hidden.dtype), mask=inside)


@jit(do_not_specialize=["M"])
def _linear_gelu_backward_kernel(
    grad_ptr,  # (M, K)
    weight_ptr,  # (K, N)
    hidden_ptr,  # (M, N)
    grad_hidden_ptr,  # (M, N)
    partial_ptr,  # (rows of tiles, N)
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row, column = tile_of(M, (N + BLOCK_N - 1) // BLOCK_N, BLOCK_M, GROUP_M)
    i, n = tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = product_tile(grad_ptr, weight_ptr, row, n, M, n < N, N, K, False, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, WIDEN)
    inside = (row * BLOCK_M + i < M)[:, None] & (n < N)[None, :]
    start, at = row.to(tl.int64) * (BLOCK_M * N), i[:, None] * N + n[None, :]
    hidden = tl.load(hidden_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    grad_hidden = (acc * _gelu_slope(hidden)).to(grad_hidden_ptr.dtype.element_ty)
    tl.store(grad_hidden_ptr + start + at, grad_hidden, mask=inside)
    # Rows beyond M are 0: their gradients were loaded as that.
    tl.store(partial_ptr + row.to(tl.int64) * N + n, tl.sum(grad_hidden.to(tl.float32), axis=0), mask=n < N)


@jit(do_not_specialize=["T", "share"])
def _gelu_backward_kernel(
    grad_ptr,  # (T, N)
    hidden_ptr,  # (T, N)
    grad_hidden_ptr,  # (T, N)
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
        hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad_hidden = (grad.to(tl.float32) * _gelu_slope(hidden)).to(grad.dtype)
        tl.store(grad_hidden_ptr + at, grad_hidden, mask=inside)
        total += grad_hidden.to(tl.float32)
    at = tl.program_id(1).to(tl.int64) * N + n
    tl.store(partial_ptr + at, tl.sum(total, axis=0), mask=n < N)

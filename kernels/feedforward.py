"""Two linear layers with a GELU between them.

Legend: T tokens, D width, N hidden width. The forward kernel applies bias and GELU to the first product in registers;
the backward kernel applies the GELU's slope to the gradient of the second layer's input and sums the bias gradient. It
can recompute the GELU from `hidden`, and `hidden` by the first product, which then never reaches memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_fake
from torch.utils.flop_counter import register_flop_formula

from fastmum.kernels.checks import check_floating, check_tensors
from fastmum.kernels.dispatch import ceil_div, empty, jit, launch, power_of_2, tl, use_triton
from fastmum.kernels.gelu import gelu, gelu_slope
from fastmum.kernels.matmul import Tiles, columns_of, fuses_products, product, product_tile, tile_of
from fastmum.kernels.plans import operator, planned
from fastmum.kernels.sums import finish_sums, row_split

RECOMPUTE = ("none", "act", "mlp")


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, recompute: str = "none") -> Tensor:
    """gelu(x @ weight1' + bias1) @ weight2' + bias2, with the exact (erf) GELU: (T, D) in the dtype of x.

    Activations that only a frozen weight's gradient would need are not saved. TypeError: dtypes that differ.
    ValueError: a shape, device or value of `recompute` that is not allowed.

    Args:
        x: (T, D) floating point.
        weight1, bias1: (N, D) and (N,), in the dtype of x.
        weight2, bias2: (D, N) and (D,), in the dtype of x. `bias2` gets no gradient here: it is the sum of the incoming
            gradient, which `add_norm` computes.
        recompute: what the backward pass recomputes: "none"; "act", the output of the GELU; "mlp", its input, too.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute is {recompute!r}, but must be one of {', '.join(RECOMPUTE)}")
    tensors = {"x": x, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    check_tensors(**tensors)
    check_floating("x", x, 2, "(T, D)")
    if len({y.dtype for y in tensors.values()}) > 1:
        raise TypeError(f"dtypes are {', '.join(f'{k} {y.dtype}' for k, y in tensors.items())}, but must be the same")
    D, N = x.shape[1], weight1.shape[0]
    for name, shape in {"weight1": (N, D), "bias1": (N,), "weight2": (D, N), "bias2": (D,)}.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, but must be {shape}")
    return _Mlp.apply(x, weight1, bias1, weight2, bias2.detach(), recompute)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, recompute):
        needs_x, needs_weight1, _, needs_weight2 = ctx.needs_input_grad[:4]
        hidden, active = _linear_gelu(x, weight1, bias1, recompute != "mlp")
        again = (x, weight1, bias1) if recompute == "mlp" else (None, None, None)
        first = x if needs_weight1 else again[0], weight1 if needs_x else again[1], again[2]
        hidden = None if recompute == "mlp" else hidden
        ctx.save_for_backward(*first, weight2, hidden, active if recompute == "none" and needs_weight2 else None)
        ctx.recompute = recompute
        return product(active, weight2.t(), bias2)

    @staticmethod
    def backward(ctx, grad):
        x, weight1, bias1, weight2, hidden, active = ctx.saved_tensors
        needs_x, needs_weight1, needs_bias1, needs_weight2 = ctx.needs_input_grad[:4]
        grad = grad.contiguous()
        first = (x, weight1, bias1) if hidden is None else (None, None, None)
        again = ctx.recompute == "mlp" or (ctx.recompute == "act" and needs_weight2)
        grad_hidden, grad_bias1, recomputed = _linear_gelu_backward(grad, weight2, hidden, *first, again)
        active = recomputed if again else active
        grad_x = product(grad_hidden, weight1) if needs_x else None
        grad_weight1 = product(grad_hidden.t(), x) if needs_weight1 else None
        grad_weight2 = product(grad.t(), active) if needs_weight2 else None
        return grad_x, grad_weight1, grad_bias1 if needs_bias1 else None, grad_weight2, None, None


@operator("linear_gelu")
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """x @ weight' + bias before (empty unless `keep`) and after the GELU, (T, N) each."""
    if fuses_products(x, "linear_gelu", weight):
        return _linear_gelu_triton(x.contiguous(), weight.contiguous(), bias, keep)
    hidden = product(x, weight.t(), bias)
    return hidden if keep else hidden.new_empty(0), F.gelu(hidden)


@register_fake(_linear_gelu)
def _(x, weight, bias, keep):
    return x.new_empty((len(x), len(weight)) if keep else 0), x.new_empty(len(x), len(weight))


@operator("linear_gelu_backward")
def _linear_gelu_backward(
    grad: Tensor, weight: Tensor, hidden: Tensor | None, x: Tensor | None, weight1: Tensor | None,
    bias1: Tensor | None, again: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of hidden (T, N), its sum over tokens (N,), and gelu(hidden), empty unless `again`.

    Without `hidden`, it is recomputed as x @ weight1' + bias1, and `again` must be true.
    """
    recompute = "mlp" if hidden is None else "act" if again else "none"
    if fuses_products(grad, f"linear_gelu_backward {recompute}", weight):
        tensors = (y if y is None else y.contiguous() for y in (grad, weight, hidden, x, weight1, bias1))
        return _backward_triton(*tensors, again)
    grad = product(grad, weight)
    return _through_gelu(grad, product(x, weight1.t(), bias1) if hidden is None else hidden, again)


@register_fake(_linear_gelu_backward)
def _(grad, weight, hidden, x, weight1, bias1, again):
    T, N = len(grad), weight.shape[1]
    return grad.new_empty(T, N), grad.new_empty(N), grad.new_empty((T, N) if again else 0)


@register_flop_formula([torch.ops.fastmum.linear_gelu, torch.ops.fastmum.linear_gelu_backward])
def _(x_shape, weight_shape, third_shape, *_, **__):
    products = 2 if third_shape is None else 1  # without `hidden`, a backward pass recomputes it
    return products * 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


def _through_gelu(grad: Tensor, hidden: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The GELU's backward pass after a library product."""
    if use_triton(grad):
        return _gelu_backward_triton(grad.contiguous(), hidden.contiguous(), again)
    grad_hidden = torch.ops.aten.gelu_backward(grad, hidden)
    return grad_hidden, grad_hidden.sum(0), F.gelu(hidden) if again else hidden.new_empty(0)


@planned
def _linear_gelu_triton(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    (T, D), N, tiles = x.shape, len(weight), Tiles.of(x.device)
    active = empty(T, N, dtype=x.dtype, device=x.device)
    hidden = empty((T, N) if keep else 0, dtype=x.dtype, device=x.device)
    args = x, weight, bias.contiguous(), hidden if keep else None, active, T
    constants = {"N": N, "K": D, "PARTS": 2} | tiles.constants(D, x)
    launch(_linear_gelu_kernel, tiles.grid(T, ceil_div(N, tiles.BLOCK_N)), *args, **constants)
    return hidden, active


@planned
def _backward_triton(grad, weight, hidden, x, weight1, bias1, again):
    (T, D), N = grad.shape, weight.shape[1]
    # Recomputation takes registers.
    tiles = Tiles.of(grad.device, BLOCK_M=64 if again else 128)
    grad_hidden = empty(T, N, dtype=grad.dtype, device=grad.device)
    active = empty((T, N) if again else 0, dtype=grad.dtype, device=grad.device)
    partial = empty(1, ceil_div(T, tiles.BLOCK_M), N, dtype=torch.float32, device=grad.device)
    grid = tiles.grid(T, ceil_div(N, tiles.BLOCK_N))
    args = grad, weight, hidden, x, weight1, bias1, grad_hidden, active if again else None, partial, T
    constants = {"N": N, "K": D, "PARTS": 2 if hidden is None else 1} | tiles.constants(D, grad)
    launch(_linear_gelu_backward_kernel, grid, *args, **constants)
    return grad_hidden, *finish_sums(partial, (grad.dtype,)), active


@planned
def _gelu_backward_triton(grad: Tensor, hidden: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    T, N = hidden.shape
    grad_hidden = empty(T, N, dtype=hidden.dtype, device=hidden.device)
    active = empty((T, N) if again else 0, dtype=hidden.dtype, device=hidden.device)
    BLOCK_N = min(power_of_2(N), 256)
    BLOCK_T = 2048 // BLOCK_N
    columns = ceil_div(N, BLOCK_N)
    # Programs of all columns share the multiprocessors: the more columns, the fewer partial sums of each.
    programs, share = row_split(T, BLOCK_T * max(1, columns // 2), grad.device)
    partial = empty(1, programs, N, dtype=torch.float32, device=grad.device)
    args = grad, hidden, grad_hidden, active if again else None, partial, T, share
    launch(_gelu_backward_kernel, (columns, programs), *args, N=N, BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N, num_warps=4)
    return grad_hidden, *finish_sums(partial, (hidden.dtype,)), active


@jit(do_not_specialize=["M"])
def _linear_gelu_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,)
    hidden_ptr,  # (M, N), or None
    active_ptr,  # (M, N)
    M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row, column = tile_of(M, (N + BLOCK_N - 1) // BLOCK_N, BLOCK_M, GROUP_M)
    EVEN_N: tl.constexpr = N % BLOCK_N == 0  # all columns exist
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = product_tile(
        x_ptr, weight_ptr, row, n, M, (n < N) | EVEN_N, N, K, True, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, WIDEN
    )
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    i, c = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    start, at = row.to(tl.int64) * (BLOCK_M * N) + column * BLOCK_N, i[:, None] * N + c[None, :]
    parts = columns_of(acc, PARTS)
    for part in tl.static_range(PARTS):
        n = column * BLOCK_N + part * WIDTH + c
        exists = (n < N) | EVEN_N
        inside = (row * BLOCK_M + i < M)[:, None] & exists[None, :]
        bias = tl.load(bias_ptr + n, mask=exists, other=0.0).to(tl.float32)[None, :]
        hidden = (parts[part] + bias).to(active_ptr.dtype.element_ty)
        if hidden_ptr is not None:
            tl.store(hidden_ptr + (start + part * WIDTH) + at, hidden, mask=inside)
        active = gelu(hidden.to(tl.float32), True).to(hidden.dtype)
        tl.store(active_ptr + (start + part * WIDTH) + at, active, mask=inside)


@jit(do_not_specialize=["M"])
def _linear_gelu_backward_kernel(
    grad_ptr,  # (M, K)
    weight_ptr,  # (K, N)
    hidden_ptr,  # (M, N), or None to recompute it
    x_ptr,  # (M, K), to recompute it
    weight1_ptr,  # (N, K)
    bias1_ptr,  # (N,)
    grad_hidden_ptr,  # (M, N)
    active_ptr,  # (M, N), or None
    partial_ptr,  # (rows of tiles, N)
    M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row, column = tile_of(M, (N + BLOCK_N - 1) // BLOCK_N, BLOCK_M, GROUP_M)
    EVEN_N: tl.constexpr = N % BLOCK_N == 0  # all columns exist
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = (n < N) | EVEN_N
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    i, c = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    start, at = row.to(tl.int64) * (BLOCK_M * N) + column * BLOCK_N, i[:, None] * N + c[None, :]
    dtype: tl.constexpr = grad_hidden_ptr.dtype.element_ty
    if hidden_ptr is None:
        acc = product_tile(x_ptr, weight1_ptr, row, n, M, exists, N, K, True, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, WIDEN)
        acc += tl.load(bias1_ptr + n, mask=exists, other=0.0).to(tl.float32)[None, :]
        recomputed = columns_of(acc.to(dtype), PARTS)
        for part in tl.static_range(PARTS):
            inside = (row * BLOCK_M + i < M)[:, None] & ((column * BLOCK_N + part * WIDTH + c < N) | EVEN_N)[None, :]
            active = gelu(recomputed[part].to(tl.float32), True).to(dtype)
            tl.store(active_ptr + (start + part * WIDTH) + at, active, mask=inside)
    acc = product_tile(grad_ptr, weight_ptr, row, n, M, exists, N, K, False, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, WIDEN)
    parts = columns_of(acc, PARTS)
    for part in tl.static_range(PARTS):
        n = column * BLOCK_N + part * WIDTH + c
        exists = (n < N) | EVEN_N
        inside = (row * BLOCK_M + i < M)[:, None] & exists[None, :]
        if hidden_ptr is None:
            hidden = recomputed[part]
        else:
            # The last row in place of rows beyond M, whose gradients are 0: without a mask there is nothing to clear.
            from_at = tl.minimum(i, M - 1 - row * BLOCK_M)[:, None] * N + c[None, :]
            hidden = tl.load(hidden_ptr + (start + part * WIDTH) + from_at, mask=exists[None, :], other=0.0)
            if active_ptr is not None:
                active = gelu(hidden.to(tl.float32), True).to(dtype)
                tl.store(active_ptr + (start + part * WIDTH) + at, active, mask=inside)
        grad_hidden = parts[part] * gelu_slope(hidden.to(tl.float32), True)
        tl.store(grad_hidden_ptr + (start + part * WIDTH) + at, grad_hidden.to(dtype), mask=inside)
        # Rows beyond M are 0, as their gradients were loaded.
        tl.store(partial_ptr + row.to(tl.int64) * N + n, tl.sum(grad_hidden, axis=0), mask=exists)


@jit(do_not_specialize=["T", "share"])
def _gelu_backward_kernel(
    grad_ptr,  # (T, N)
    hidden_ptr,  # (T, N)
    grad_hidden_ptr,  # (T, N)
    active_ptr,  # (T, N), or None
    partial_ptr,  # (programs, N)
    T,
    share,  # rows of a program
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, T)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    SHORT: tl.constexpr = grad_hidden_ptr.dtype.element_ty.primitive_bitwidth == 16
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for first in range(begin, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = (t < end)[:, None] & (n < N)[None, :]
        at = t.to(tl.int64)[:, None] * N + n[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad_hidden = (grad.to(tl.float32) * gelu_slope(hidden, SHORT)).to(grad.dtype)
        tl.store(grad_hidden_ptr + at, grad_hidden, mask=inside)
        if active_ptr is not None:  # the forward pass is PyTorch's
            tl.store(active_ptr + at, gelu(hidden, False).to(grad.dtype), mask=inside)
        total += grad_hidden.to(tl.float32)
    at = tl.program_id(1).to(tl.int64) * N + n
    tl.store(partial_ptr + at, tl.sum(total, axis=0), mask=n < N)

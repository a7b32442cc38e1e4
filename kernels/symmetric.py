"""Products x x' of stacks of matrices, which are symmetric: half of their tiles are computed, and stored twice.

Legend: n matrices, r rows, c columns. Half precision is summed in float32; float32 is never rounded to TF32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake
from torch.utils.flop_counter import register_flop_formula

from fastmum.kernels.checks import check_floating
from fastmum.kernels.dispatch import ceil_div, empty, jit, launch, tl, use_triton
from fastmum.kernels.matmul import SIXTEEN_BITS, products_choice, widens
from fastmum.kernels.plans import operator, planned

CPU_ROWS = 128  # fewer are faster as one product


def symmetric_product(x: Tensor, alpha: float = 1.0, add: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """alpha * x @ x' + beta * add.

    Args:
        x: (n, r, c) floating point, any strides.
        alpha: factor of the product, not 0.
        add: (n, r, r) symmetric, in the dtype of x.
        beta: factor of `add`.

    Returns:
        (n, r, r) symmetric, contiguous, in the dtype of x. TypeError or ValueError: another dtype or shape. On a GPU
        by one kernel, or with `FASTMUM_PRODUCTS=library` by the library.
    """
    check_floating("x", x, 3, "(n, r, c)")
    n, r, _ = x.shape
    if add is not None and add.dtype != x.dtype:
        raise TypeError(f"add has dtype {add.dtype}, but x has {x.dtype}")
    if add is not None and add.shape != (n, r, r):
        raise ValueError(f"add has shape {tuple(add.shape)}, but must be {(n, r, r)}")
    if alpha == 0:
        raise ValueError("alpha is 0: without the product nothing is to be computed")
    return (_symmetric_product if use_triton(x) else _symmetric_torch)(x, alpha, add, beta)


@operator("symmetric_product")
def _symmetric_product(x: Tensor, alpha: float, add: Tensor | None, beta: float) -> Tensor:
    fused = use_triton(x) and products_choice() != "library"
    return (_symmetric_triton if fused else _symmetric_torch)(x, alpha, add, beta)


@register_fake(_symmetric_product)
def _(x, alpha, add, beta):
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])


@register_flop_formula(torch.ops.fastmum.symmetric_product)
def _(x_shape, *_, **__):
    n, r, c = x_shape
    return n * r * (r + 1) * c


def _symmetric_torch(x: Tensor, alpha: float, add: Tensor | None, beta: float) -> Tensor:
    if widens(x):
        return _symmetric_torch(x.float(), alpha, None if add is None else add.float(), beta).to(x.dtype)
    n, r, _ = x.shape
    add, beta = (x.new_zeros(()).expand(n, r, r), 0.0) if add is None else (add, beta)
    if x.device.type != "cpu" or r < CPU_ROWS:
        return torch.baddbmm(add, x, x.mT, beta=beta, alpha=alpha)
    out, block = x.new_empty(n, r, r), ceil_div(r, 4)
    for first in range(0, r, block):  # rows up to the diagonal, then the columns above it
        rows, columns = slice(first, first + block), slice(0, first + block)
        product = torch.baddbmm(add[:, rows, columns], x[:, rows], x[:, columns].mT, beta=beta, alpha=alpha)
        out[:, rows, columns] = product
        out[:, :first, rows] = product[:, :, :first].mT
    return out


def tile_sizes(dtype: torch.dtype) -> tuple[int, int]:
    """Rows, and columns, of a tile of the product, and columns of x at once."""
    return (128, 64) if dtype in SIXTEEN_BITS else (64, 32)


@planned
def _symmetric_triton(x: Tensor, alpha: float, add: Tensor | None, beta: float) -> Tensor:
    n, r, c = x.shape
    out = empty(n, r, r, dtype=x.dtype, device=x.device)
    add = None if add is None else add.contiguous()
    BLOCK, BLOCK_K = tile_sizes(x.dtype)
    tiles = ceil_div(r, BLOCK)
    args = x, add, out, alpha, beta / alpha, r, c, *x.stride()
    constants = {"BLOCK": BLOCK, "BLOCK_K": BLOCK_K, "EVEN_K": c % BLOCK_K == 0, "WIDEN": x.device.type == "cpu"}
    launch(_symmetric_kernel, (n * tiles * (tiles + 1) // 2,), *args, **constants, num_warps=8, num_stages=3)
    return out


@jit(do_not_specialize=["alpha", "ratio"])
def _symmetric_kernel(
    x_ptr,  # (n, R, C) by the strides
    add_ptr,  # (n, R, R), or None
    out_ptr,  # (n, R, R)
    alpha,
    ratio,  # factor of `add`, before alpha
    R, C, stride_n, stride_r, stride_c,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,  # in the interpreter, which would multiply bit patterns of bfloat16
):  # fmt: skip
    # Tiles on and below the diagonal are numbered row by row: the first of a row is number row * (row + 1) / 2.
    tiles = tl.cdiv(R, BLOCK)
    lower = tiles * (tiles + 1) // 2
    matrix, tile = (tl.program_id(0) // lower).to(tl.int64), tl.program_id(0) % lower
    row = ((tl.sqrt_rn(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tile - row * (row + 1) // 2
    i, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    m, n = row * BLOCK + i, column * BLOCK + i
    x_ptr += matrix * stride_n
    a_at = x_ptr + (row * BLOCK).to(tl.int64) * stride_r + (i[:, None] * stride_r + k[None, :] * stride_c)
    b_at = x_ptr + (column * BLOCK).to(tl.int64) * stride_r + (i[None, :] * stride_r + k[:, None] * stride_c)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    inside, start = (m < R)[:, None] & (n < R)[None, :], matrix * R * R
    if add_ptr is not None:  # before the loop, which leaves registers for two programs on a multiprocessor of sm_90
        add = tl.load(add_ptr + start + (m[:, None] * R + n[None, :]), mask=inside, other=0.0)
        acc += ratio * add.to(tl.float32)
    for first in range(0, C, BLOCK_K):
        a_inside, b_inside = (m < R)[:, None], (n < R)[None, :]
        if not EVEN_K:
            a_inside, b_inside = a_inside & (first + k < C)[None, :], b_inside & (first + k < C)[:, None]
        a = tl.load(a_at, mask=a_inside, other=0.0)
        b = tl.load(b_at, mask=b_inside, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_at += BLOCK_K * stride_c
        b_at += BLOCK_K * stride_c
    value = (alpha * acc).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + start + (m[:, None] * R + n[None, :]), value, mask=inside)
    if row != column:
        tl.store(out_ptr + start + (n[:, None] * R + m[None, :]), tl.trans(value), mask=tl.trans(inside))

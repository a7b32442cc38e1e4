"""Scatter visible tokens among mask tokens, and gather selected tokens.

Legend: F frames, P patches of a frame, K visible, M selected patches, D width. Token 0 of a frame is CLS, patch i is
token i + 1.

`scatter_tokens` fuses expansion of the mask token, concatenation and permutation. Its backward pass gathers and sums
the mask token's gradient in one read, in two stages of a fixed order.
"""

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from fastmum.kernels.checks import check_floating, check_ids, check_range, check_tensors
from fastmum.kernels.dispatch import ceil_div, empty, jit, launch, power_of_2, tile_bytes, tl, use_triton
from fastmum.kernels.plans import operator, planned

MASK_SPLIT = 4  # programs per frame that sum the mask token's gradient


def scatter_tokens(visible: Tensor, mask_token: Tensor, visible_ids: Tensor, num_patches: int) -> Tensor:
    """The decoder's input: CLS first, visible tokens at their patches, the mask token everywhere else.

    Returns (F, 1 + P, D), in the dtype of `visible`. The mask token's gradient is summed in float32 at least. TypeError
    or ValueError: a dtype, shape or device that is not allowed. IndexError: ids out of range, on the CPU; a GPU, which
    would have to synchronise, drops these tokens.

    Args:
        visible: (F, 1 + K, D) floating point, CLS first.
        mask_token: D values in any shape, any floating-point dtype.
        visible_ids: (F, K) int64 or int32, patch numbers in 0..P-1, distinct in a row.
        num_patches: P.
    """
    check_tensors(visible=visible, mask_token=mask_token, visible_ids=visible_ids)
    check_floating("visible", visible, 3, "(F, 1 + K, D)")
    F, count, D = visible.shape
    check_ids("visible_ids", visible_ids, F)
    if count != 1 + visible_ids.shape[1]:
        raise ValueError(f"visible has {count} tokens a frame, but must have 1 + {visible_ids.shape[1]}")
    if mask_token.numel() != D or not mask_token.is_floating_point():
        shape = tuple(mask_token.shape)
        raise ValueError(f"mask_token is {mask_token.dtype} {shape}, but must be {D} values in floating point")
    if num_patches < visible_ids.shape[1]:
        raise ValueError(f"num_patches is {num_patches}, but {visible_ids.shape[1]} patches of a frame are visible")
    return _scatter_tokens(visible, mask_token.reshape(D), visible_ids, num_patches)


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Select the tokens of some patches of every frame; returns (F, M, D), contiguous.

    `tokens` are (F, 1 + P, D) floating point, CLS first; `ids` (F, M) int64 or int32, patch numbers in 0..P-1, distinct
    in a row. TypeError or ValueError: a dtype, shape or device that is not allowed. IndexError: ids out of range, on
    the CPU; a GPU, which would have to synchronise, gives NaN.
    """
    check_tensors(tokens=tokens, ids=ids)
    check_floating("tokens", tokens, 3, "(F, 1 + P, D)")
    check_ids("ids", ids, len(tokens))
    return _gather_tokens(tokens, ids)


@operator("scatter_tokens")
def _scatter_tokens(visible: Tensor, mask_token: Tensor, visible_ids: Tensor, num_patches: int) -> Tensor:
    check_range("visible_ids", visible_ids, 0, num_patches)
    return _place(visible, mask_token, visible_ids, num_patches)


register_fake(_scatter_tokens, lambda x, mask_token, ids, num_patches: x.new_empty(len(x), 1 + num_patches, x.shape[2]))


@operator("scatter_tokens_backward")
def _scatter_tokens_backward(grad: Tensor, visible_ids: Tensor, mask_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    if use_triton(grad):
        grad_visible, partial = _scatter_tokens_backward_triton(grad, visible_ids)
        return grad_visible, partial.sum(0).to(mask_dtype)
    F, T, D = grad.shape
    rows = _token_rows(visible_ids, T, cls=True)
    grad_visible = grad.view(-1, D).index_select(0, rows.flatten()).view(F, -1, D)
    is_masked = torch.ones(F * T, dtype=torch.bool, device=grad.device).index_fill_(0, rows.flatten(), False)
    work = torch.promote_types(grad.dtype, torch.float32)
    grad_mask = grad.view(-1, D).index_select(0, is_masked.nonzero().flatten()).sum(0, dtype=work)
    return grad_visible, grad_mask.to(mask_dtype)


@register_fake(_scatter_tokens_backward)
def _(grad, visible_ids, mask_dtype):
    F, _, D = grad.shape
    return grad.new_empty(F, 1 + visible_ids.shape[1], D), grad.new_empty(D, dtype=mask_dtype)


@operator("gather_tokens")
def _gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    F, T, D = tokens.shape
    check_range("ids", ids, 0, T - 1)
    tokens = tokens.contiguous()
    if use_triton(tokens):
        return _gather_tokens_triton(tokens, ids)
    return tokens.view(-1, D).index_select(0, _token_rows(ids, T).flatten()).view(F, -1, D)


register_fake(_gather_tokens, lambda tokens, ids: tokens.new_empty(*ids.shape, tokens.shape[2]))


@operator("gather_tokens_backward")
def _gather_tokens_backward(grad: Tensor, ids: Tensor, num_patches: int) -> Tensor:
    return _place(grad, None, ids, num_patches)


register_fake(_gather_tokens_backward, lambda x, ids, num_patches: x.new_empty(len(x), 1 + num_patches, x.shape[2]))


def _setup_scatter(ctx, inputs, output):
    _, mask_token, visible_ids, _ = inputs
    ctx.mask_dtype = mask_token.dtype
    ctx.save_for_backward(visible_ids)


def _backward_scatter(ctx, grad):
    return *_scatter_tokens_backward(grad, *ctx.saved_tensors, ctx.mask_dtype), None, None


def _setup_gather(ctx, inputs, output):
    tokens, ids = inputs
    ctx.num_patches = tokens.shape[1] - 1
    ctx.save_for_backward(ids)


def _backward_gather(ctx, grad):
    return _gather_tokens_backward(grad, *ctx.saved_tensors, ctx.num_patches), None


register_autograd(_scatter_tokens, _backward_scatter, setup_context=_setup_scatter)
register_autograd(_gather_tokens, _backward_gather, setup_context=_setup_gather)


def _token_rows(ids: Tensor, tokens_a_frame: int, cls: bool = False) -> Tensor:
    """Rows of (F * (1 + P), D) with the patches `ids`, after the frame's CLS if `cls`."""
    rows = ids + 1
    if cls:
        rows = torch.nn.functional.pad(rows, (1, 0))
    return rows + torch.arange(0, len(ids) * tokens_a_frame, tokens_a_frame, device=ids.device)[:, None]


def _place(source: Tensor, fill: Tensor | None, ids: Tensor, num_patches: int) -> Tensor:
    """Scatter `source` to the patches `ids`. With `fill`, the source starts with CLS; without, 0 fills the rest."""
    if use_triton(source):
        return _place_triton(source, fill, ids, num_patches)
    F, _, D = source.shape
    out = torch.empty(F, 1 + num_patches, D, dtype=source.dtype, device=source.device)
    out.copy_(0 if fill is None else fill)
    rows = _token_rows(ids, 1 + num_patches, cls=fill is not None).flatten()
    out.view(-1, D).index_copy_(0, rows, source.contiguous().view(-1, D))
    return out


@planned
def _place_triton(source: Tensor, fill: Tensor | None, ids: Tensor, num_patches: int) -> Tensor:
    F, count, D = source.shape
    out = empty(F, 1 + num_patches, D, dtype=source.dtype, device=source.device)
    fill = None if fill is None else fill.contiguous()
    BLOCK_T, BLOCK_D = _tile(source)
    grid = F * ceil_div(1 + num_patches, BLOCK_T), ceil_div(D, BLOCK_D)
    args = source.contiguous(), fill, ids.contiguous(), out, count, ids.shape[1], 1 + num_patches
    launch(_place_kernel, grid, *args, D=D, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=4)
    return out


@planned
def _gather_tokens_triton(tokens: Tensor, ids: Tensor) -> Tensor:
    _, T, D = tokens.shape
    out = empty(*ids.shape, D, dtype=tokens.dtype, device=tokens.device)
    BLOCK_T, BLOCK_D = _tile(tokens)
    grid = ceil_div(ids.numel(), BLOCK_T), ceil_div(D, BLOCK_D)
    args = tokens, ids.contiguous(), out, ids.numel(), ids.shape[1], T
    launch(_gather_kernel, grid, *args, D=D, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=4)
    return out


@planned
def _scatter_tokens_backward_triton(grad: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the visible tokens, and partial sums of that of the mask token."""
    F, T, D = grad.shape
    grad_visible = empty(F, 1 + ids.shape[1], D, dtype=grad.dtype, device=grad.device)
    partial = empty(F * MASK_SPLIT, D, dtype=torch.float32, device=grad.device)
    BLOCK_T, BLOCK_D = _tile(grad)
    grid = F * MASK_SPLIT, ceil_div(D, BLOCK_D)
    args = grad, ids.contiguous(), grad_visible, partial, ids.shape[1], T
    constants = {"D": D, "SPLIT": MASK_SPLIT, "BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D}
    launch(_scatter_backward_kernel, grid, *args, **constants, num_warps=4)
    return grad_visible, partial


def _tile(x: Tensor) -> tuple[int, int]:
    """Tokens and channels of a program; the channels divide D if a power of two of at least 64 does."""
    D = x.shape[-1]
    divisor = D & -D
    BLOCK_D = min(divisor if divisor >= 64 else power_of_2(D), 512)
    return max(1, tile_bytes(x.device) // (BLOCK_D * x.element_size())), BLOCK_D


@jit(do_not_specialize=["count", "K", "T"])
def _place_kernel(
    source_ptr,  # (F, count, D)
    fill_ptr,  # (D,) or None
    ids_ptr,  # (F, K)
    out_ptr,  # (F, T, D)
    count,  # 1 + K with CLS, K without
    K,
    T,  # 1 + P
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_T)
    f = tl.program_id(0) // blocks
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = _slot_of_token(ids_ptr + f.to(tl.int64) * K, t, K, fill_ptr is not None, BLOCK_T)

    at = (f.to(tl.int64) * count + slot)[:, None] * D + d[None, :]
    x = tl.load(source_ptr + at, mask=(slot >= 0)[:, None] & (d < D)[None, :], other=0.0)
    if fill_ptr is not None:
        fill = tl.load(fill_ptr + d, mask=d < D, other=0.0).to(tl.float32).to(x.dtype)
        x = tl.where((slot >= 0)[:, None], x, fill[None, :])
    at = (f.to(tl.int64) * T + t)[:, None] * D + d[None, :]
    tl.store(out_ptr + at, x, mask=(t < T)[:, None] & (d < D)[None, :])


@jit(do_not_specialize=["rows", "M", "T"])
def _gather_kernel(
    tokens_ptr,  # (F, T, D)
    ids_ptr,  # (F, M)
    out_ptr,  # (F, M, D)
    rows,  # F * M
    M,
    T,  # 1 + P
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.load(ids_ptr + row, mask=row < rows, other=-1) + 1
    valid = (token > 0) & (token < T)
    at = ((row // M).to(tl.int64) * T + token)[:, None] * D + d[None, :]
    x = tl.load(tokens_ptr + at, mask=valid[:, None] & (d < D)[None, :], other=float("nan"))
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out_ptr + at, x, mask=(row < rows)[:, None] & (d < D)[None, :])


@jit(do_not_specialize=["K", "T"])
def _scatter_backward_kernel(
    grad_ptr,  # (F, T, D)
    ids_ptr,  # (F, K)
    grad_visible_ptr,  # (F, 1 + K, D)
    partial_ptr,  # (F * SPLIT, D)
    K,
    T,  # 1 + P
    D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    f = (tl.program_id(0) // SPLIT).to(tl.int64)
    share = tl.cdiv(T, SPLIT)
    begin = tl.program_id(0) % SPLIT * share
    end = tl.minimum(begin + share, T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(begin, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = (t < end)[:, None] & (d < D)[None, :]
        slot = _slot_of_token(ids_ptr + f * K, t, K, True, BLOCK_T)
        grad = tl.load(grad_ptr + (f * T + t)[:, None] * D + d[None, :], mask=inside, other=0.0)
        at = (f * (1 + K) + slot)[:, None] * D + d[None, :]
        tl.store(grad_visible_ptr + at, grad, mask=inside & (slot >= 0)[:, None])
        total += tl.where((slot < 0)[:, None], grad.to(tl.float32), 0.0)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + d, tl.sum(total, axis=0), mask=d < D)


@jit()
def _slot_of_token(ids_ptr, t, K, CLS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Row of the source for token t of a frame, -1 if there is none; CLS is row 0 of a source that has it."""
    slot = tl.where(t == 0, 0, -1) if CLS else tl.full((BLOCK_T,), -1, tl.int32)
    for first in range(0, K, 64):
        k = first + tl.arange(0, 64)
        token = tl.load(ids_ptr + k, mask=k < K, other=-2) + 1
        found = tl.where(t[:, None] == token[None, :], k[None, :] + CLS, -1)
        slot = tl.maximum(slot, tl.max(found, axis=1))
    return slot

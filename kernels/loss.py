"""The training loss: predictions against the normalised pixels of their patches.

Legend: F frames, H W pixels, C channels, p patch side, M masked patches of a frame.

Fuses scaling, normalisation, patchification, selection, patch statistics, difference, square and mean. The target
exists in registers only and is recomputed in the backward pass: a uint8 pixel is one byte to read, a stored gradient
would be one more write and read.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from fastmum.kernels.checks import check_floating, check_range, check_tensors
from fastmum.kernels.dispatch import ceil_div, empty, jit, launch, power_of_2, tl, use_triton
from fastmum.kernels.patches import check_pixels, gather_patches_torch, load_pixel_rows, pixel_row_start
from fastmum.kernels.plans import operator, planned

CHUNK_VALUES = 1 << 19  # values of pred that the CPU processes at once


def patch_loss(
    pred: Tensor, frames: Tensor, ids: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor,
    patch_size: int, norm_pix: bool = True, eps: float = 1e-6, reduction: Literal["mean", "none"] = "mean",
) -> Tensor:  # fmt: skip
    """Mean squared error between predictions and patches: the training loss.

    Returns a scalar, or (F,), float32 (float64 for float64 predictions): the mean over masked patches and their values,
    accumulated in that dtype in a fixed order. `pred` gets a gradient, and frames that require one. Errors are those of
    `gather_patches`, and the same for `pred` and `reduction`.

    Args:
        pred: (F, M, p*p*C) floating point, not empty, predictions for the patches `ids`.
        frames, ids, mean, std, patch_size: as in `gather_patches`.
        norm_pix: whether the target is its patch's (x - mean) / sqrt(var + eps), with the unbiased variance.
        eps: added to the variance.
        reduction: "mean" over all frames, or "none": one loss per frame.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is {reduction!r}, but must be 'mean' or 'none'")
    check_tensors(pred=pred, frames=frames, ids=ids)
    frames, gain, bias = check_pixels(frames, ids, mean, std, patch_size)
    expected = (*ids.shape, patch_size**2 * frames.shape[3])
    check_floating("pred", pred, 3, f"{expected}")
    if tuple(pred.shape) != expected or not pred.numel():
        raise ValueError(f"pred has shape {tuple(pred.shape)}, but ids and frames call for {expected}, not empty")
    # The gradient of the target, from PyTorch's own operations.
    if frames.requires_grad and torch.is_grad_enabled():
        work = torch.promote_types(pred.dtype, torch.float32)
        target = gather_patches_torch(frames, ids, gain, bias, patch_size, work)
        if norm_pix:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) * torch.rsqrt(var + eps)
        pred = pred + (target.detach() - target)  # adds 0, and the gradient of the target
    losses = _patch_loss(pred, frames.detach(), ids, gain, bias, patch_size, norm_pix, eps)
    return losses.mean() if reduction == "mean" else losses


@operator("patch_loss")
def _patch_loss(
    pred: Tensor, frames: Tensor, ids: Tensor, gain: list[float], bias: list[float], patch_size: int, norm_pix: bool,
    eps: float,
) -> Tensor:  # fmt: skip
    check_range("ids", ids, 0, frames.shape[1] * frames.shape[2] // patch_size**2)
    settings = tuple(gain), tuple(bias), patch_size, norm_pix, eps
    if use_triton(pred):
        partial = empty(ids.numel(), dtype=torch.float32, device=pred.device)
        _launch(partial, None, pred, frames, ids, *settings)
        return partial.view(ids.shape).sum(1)
    chunks = _chunks(pred, frames, ids)
    return torch.cat([_difference_torch(*chunk, *settings).square_().mean((1, 2)) for chunk in chunks])


register_fake(_patch_loss, lambda x, *_: x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32)))


@operator("patch_loss_backward")
def _patch_loss_backward(
    grad_losses: Tensor, pred: Tensor, frames: Tensor, ids: Tensor, gain: list[float], bias: list[float],
    patch_size: int, norm_pix: bool, eps: float,
) -> Tensor:  # fmt: skip
    grad = empty(pred.shape, dtype=pred.dtype, device=pred.device)
    settings = tuple(gain), tuple(bias), patch_size, norm_pix, eps
    if use_triton(pred):
        _launch(grad, grad_losses.contiguous(), pred, frames, ids, *settings)
        return grad
    scale = (grad_losses * (2 / pred[0].numel()))[:, None, None]
    for grad_chunk, scale_chunk, *chunk in _chunks(grad, scale, pred, frames, ids):
        torch.mul(_difference_torch(*chunk, *settings), scale_chunk, out=grad_chunk)
    return grad


register_fake(_patch_loss_backward, lambda grad_losses, pred, *_: pred.new_empty(pred.shape))


def _setup_context(ctx, inputs, output):
    pred, frames, ids, *ctx.settings = inputs
    ctx.save_for_backward(pred, frames, ids)


def _backward(ctx, grad_losses):
    grad = _patch_loss_backward(grad_losses, *ctx.saved_tensors, *ctx.settings)
    return grad, *(None,) * (2 + len(ctx.settings))


register_autograd(_patch_loss, _backward, setup_context=_setup_context)


def _chunks(*tensors: Tensor) -> zip:
    """Split into a few frames each: their temporaries stay in the cache, and none has the size of `pred`."""
    step = ceil_div(CHUNK_VALUES, tensors[0][0].numel())
    return zip(*(x.split(step) for x in tensors), strict=True)


def _difference_torch(pred, frames, ids, gain, bias, patch_size, norm_pix, eps):
    """pred - target, in float32 at least."""
    work = torch.promote_types(pred.dtype, torch.float32)
    target = gather_patches_torch(frames, ids, gain, bias, patch_size, work)
    if norm_pix:
        # Not torch.var_mean, which takes twenty times as long on the CPU (docs/LOG.md, 2026-11-23). Relative to the
        # patch's first value, a constant patch is exactly 0, not a rounding error times 1e3.
        target -= target[..., :1].clone()
        target -= target.mean(-1, keepdim=True)
        var = torch.linalg.vector_norm(target, dim=-1, keepdim=True).square_() / (target.shape[-1] - 1)
        target *= torch.rsqrt(var + eps)
    return torch.sub(pred, target, out=target)


@planned
def _launch(out, grad_losses, pred, frames, ids, gain, bias, patch_size, norm_pix, eps):
    """Fill `out` with the patches' shares of their frame's loss, or with the gradient of `pred`."""
    F, H, W, C = frames.shape
    p, M = patch_size, ids.shape[1]
    ROWS, COLS = power_of_2(p), power_of_2(p * C)
    sizes = M, W // p, (H // p) * (W // p), *frames.stride()
    settings = gain, bias, 1.0 / pred[0].numel(), eps
    args = out, grad_losses, pred.contiguous(), frames, ids.contiguous(), *sizes, *settings
    constants = {"C": C, "p": p, "NORM_PIX": norm_pix, "DENSE": frames.stride()[2:] == (C, 1)}
    num_warps = min(8, max(1, ROWS * COLS // 512))  # 16 values per thread: a 16-byte load of uint8
    # One program per patch; 32 of them on an SM have 70 kB in flight.
    launch(_patch_loss_kernel, (F * M,), *args, **constants, ROWS=ROWS, COLS=COLS, num_warps=num_warps)


@jit(do_not_specialize=["M"])
def _patch_loss_kernel(
    out_ptr,  # forward (F * M,); backward (F * M, p * p * C)
    grad_losses_ptr,  # (F,) in the backward pass, None in the forward pass
    pred_ptr,  # (F * M, p * p * C)
    frames_ptr,  # (F, H, W, C) by the strides
    ids_ptr,  # (F * M,)
    M, grid_w, num_patches, stride_f, stride_h, stride_w, stride_c,
    gain,  # C floats
    bias,
    inverse_count,  # 1 / (M * p * p * C)
    eps,
    C: tl.constexpr, p: tl.constexpr, NORM_PIX: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    patch = tl.program_id(0)
    patch_id = tl.load(ids_ptr + patch).to(tl.int32)
    valid = (patch_id >= 0) & (patch_id < num_patches)

    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (row < p)[:, None] & (col < p * C)[None, :]
    start = pixel_row_start(patch // M, patch_id, row, grid_w, stride_f, stride_h, stride_w, p)
    exists = row < tl.where(valid, p, 0)
    target = load_pixel_rows(frames_ptr, start, exists, stride_w, stride_c, gain, bias, C, p, DENSE, COLS)
    if NORM_PIX:
        # Relative to the patch's first value, a constant patch is exactly 0, not a rounding error times 1e3.
        corner = pixel_row_start(patch // M, patch_id, 0, grid_w, stride_f, stride_h, stride_w, p)
        first = tl.load(frames_ptr + corner, mask=valid, other=0).to(tl.float32) * gain[0] - bias[0]
        target = tl.where(inside, target - first, 0.0)
        target = tl.where(inside, target - tl.sum(target) / (p * p * C), 0.0)
        target *= tl.rsqrt(tl.sum(target * target) / (p * p * C - 1) + eps)

    at = patch.to(tl.int64) * (p * p * C) + row[:, None] * (p * C) + col[None, :]
    difference = tl.load(pred_ptr + at, mask=inside, other=0.0).to(tl.float32) - target
    if grad_losses_ptr is None:
        loss = tl.sum(difference * difference) * inverse_count
        tl.store(out_ptr + patch, tl.where(valid, loss, float("nan")))
    else:
        scale = tl.load(grad_losses_ptr + patch // M).to(tl.float32) * 2.0 * inverse_count
        grad = difference * tl.where(valid, scale, float("nan"))
        tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=inside)

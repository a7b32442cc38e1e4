"""Selected patches of raw frames as normalised vectors.

Legend: F frames, H W pixels, C channels, p patch side, P patches of a frame, K selected. A patch vector has p*p*C
values in the order (row, column, channel), channel fastest; patches are numbered row by row.

Fuses scaling, normalisation, patchification and selection. Only selected pixels are read, in their own dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import register_fake

from fastmum.kernels.checks import check_ids, check_range, check_tensors
from fastmum.kernels.dispatch import ceil_div, empty, jit, launch, power_of_2, tile_bytes, tl, use_triton
from fastmum.kernels.plans import operator, planned


def gather_patches(
    frames: Tensor, ids: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, patch_size: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Selected patches of every frame as normalised vectors, ready for the patch embedding's matrix product.

    Returns (F, K, p*p*C), contiguous. For frames that require a gradient, PyTorch's own operations run. TypeError or
    ValueError: a dtype, shape or device that is not allowed. IndexError: ids out of range, on the CPU; a GPU, which
    would have to synchronise, gives NaN.

    Args:
        frames: (F, H, W, C), any strides, uint8 (scaled by 1/255 first) or floating point (not scaled). Floating-point
            frames whose last axis is not of length C may be (F, C, H, W).
        ids: (F, K) int64 or int32, patch numbers in 0..P-1.
        mean, std: C values each, in units of frames in 0..1; the result is (value - mean) / std. Tensors on a GPU
            cost a synchronisation.
        patch_size: p, dividing H and W.
        dtype: of the result, floating point. The arithmetic is in float32, in float64 if frames or result are.
    """
    frames, gain, bias = check_pixels(frames, ids, mean, std, patch_size)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}, but must be floating point")
    if frames.requires_grad and torch.is_grad_enabled():
        return gather_patches_torch(frames, ids, gain, bias, patch_size, dtype)
    return _gather_patches(frames, ids, gain, bias, patch_size, dtype)


def check_pixels(
    frames: Tensor, ids: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, patch_size: int
) -> tuple[Tensor, list[float], list[float]]:
    """Check the arguments of an operation on pixels; see `gather_patches`.

    Returns frames as (F, H, W, C), and gain and bias of every channel: (x - mean) / std = value * gain - bias.
    """
    check_tensors(frames=frames, ids=ids)
    mean, std = (x.tolist() if isinstance(x, Tensor) else list(x) for x in (mean, std))
    if frames.dtype != torch.uint8 and not frames.is_floating_point():
        raise TypeError(f"frames has dtype {frames.dtype}, but must be uint8 or floating point")
    shape, channels = tuple(frames.shape), len(mean)
    if len(std) != channels or not channels:
        raise ValueError(f"mean has {channels} values and std {len(std)}, but each must have one for every channel")
    if frames.ndim == 4 and frames.is_floating_point() and shape[3] != channels == shape[1]:
        frames = frames.permute(0, 2, 3, 1)
    if frames.ndim != 4 or frames.shape[3] != channels:
        raise ValueError(f"frames has shape {shape}, but must be (F, H, W, {channels}), as mean has {channels} values")
    _, height, width, _ = frames.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"frames of {height} x {width} pixels do not divide into {patch_size} x {patch_size} patches")
    check_ids("ids", ids, len(frames))
    scale = 255.0 if frames.dtype == torch.uint8 else 1.0
    return frames, [1.0 / (scale * s) for s in std], [m / s for m, s in zip(mean, std, strict=True)]


@operator("gather_patches")
def _gather_patches(
    frames: Tensor, ids: Tensor, gain: list[float], bias: list[float], patch_size: int, dtype: torch.dtype
) -> Tensor:
    check_range("ids", ids, 0, frames.shape[1] * frames.shape[2] // patch_size**2)
    if use_triton(frames) and dtype != torch.float64:
        return _gather_patches_triton(frames, ids, tuple(gain), tuple(bias), patch_size, dtype)
    return gather_patches_torch(frames, ids, gain, bias, patch_size, dtype)


@register_fake(_gather_patches)
def _(frames, ids, gain, bias, patch_size, dtype):
    return frames.new_empty((*ids.shape, patch_size**2 * frames.shape[3]), dtype=dtype)


def gather_patches_torch(
    frames: Tensor, ids: Tensor, gain: list[float], bias: list[float], patch_size: int, dtype: torch.dtype
) -> Tensor:
    """The PyTorch implementation, for the CPU: pixel rows of patches are copied, then scaled."""
    F, H, W, C = frames.shape
    p, grid_w = patch_size, W // patch_size
    work = torch.promote_types(torch.promote_types(dtype, torch.float32), frames.dtype)
    gain_C, bias_C = (torch.tensor(x, dtype=work, device=frames.device) for x in (gain, bias))
    frame = torch.arange(F, device=ids.device)[:, None]
    if frames.is_contiguous():
        rows = frames.view(-1, p * C)  # (F * H * grid_w, p*C)
        first = (frame * H + ids // grid_w * p) * grid_w + ids % grid_w
        at = first[:, :, None] + torch.arange(0, p * grid_w, grid_w, device=ids.device)
        patches = rows.index_select(0, at.flatten())
        gain_C, bias_C = gain_C.repeat(p), bias_C.repeat(p)
    else:
        grid = frames.unflatten(2, (grid_w, p)).unflatten(1, (H // p, p)).transpose(2, 3)
        patches = grid[frame, ids // grid_w, ids % grid_w]  # (F, K, p, p, C)
    return (patches.to(work) * gain_C).sub_(bias_C).to(dtype).reshape(*ids.shape, p * p * C)


@planned
def _gather_patches_triton(frames, ids, gain, bias, patch_size, dtype):
    F, H, W, C = frames.shape
    K, p = ids.shape[1], patch_size
    out = empty(F, K, p * p * C, dtype=dtype, device=frames.device)
    rows, COLS = F * K * p, power_of_2(p * C)
    ROWS = power_of_2(max(1, tile_bytes(frames.device) // (p * C * out.element_size())))
    sizes = rows, K, W // p, (H // p) * (W // p), *frames.stride()
    args = frames, ids.contiguous(), out, *sizes, gain, bias
    constants = {"C": C, "p": p, "DENSE": frames.stride()[2:] == (C, 1), "ROWS": ROWS, "COLS": COLS}
    launch(_gather_patches_kernel, (ceil_div(rows, ROWS),), *args, **constants, num_warps=4)
    return out


@jit(do_not_specialize=["rows", "K"])
def _gather_patches_kernel(
    frames_ptr,  # (F, H, W, C) by the strides
    ids_ptr,  # (F, K)
    out_ptr,  # (F * K * p, p * C)
    rows,  # F * K * p pixel rows, below 2^31
    K, grid_w, num_patches, stride_f, stride_h, stride_w, stride_c,
    gain,  # C floats
    bias,
    C: tl.constexpr, p: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    patch = row // p
    patch_id = tl.load(ids_ptr + patch, mask=row < rows, other=-1).to(tl.int32)
    valid = (patch_id >= 0) & (patch_id < num_patches)
    start = pixel_row_start(patch // K, patch_id, row % p, grid_w, stride_f, stride_h, stride_w, p)
    x = load_pixel_rows(frames_ptr, start, valid, stride_w, stride_c, gain, bias, C, p, DENSE, COLS)
    x = tl.where(valid[:, None], x, float("nan"))
    col = tl.arange(0, COLS)
    at = row.to(tl.int64)[:, None] * (p * C) + col[None, :]
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (col < p * C)[None, :])


@jit()
def pixel_row_start(f, patch_id, row, grid_w, stride_f, stride_h, stride_w, p: tl.constexpr):
    """Offset of a pixel row of a patch."""
    y = patch_id // grid_w * p + row
    x = patch_id % grid_w
    # In this order Triton recognises that the offset is a multiple of p * stride_w.
    return f.to(tl.int64) * stride_f + y.to(tl.int64) * stride_h + x.to(tl.int64) * (p * stride_w)


@jit()
def load_pixel_rows(
    frames_ptr, start, valid, stride_w, stride_c, gain, bias,
    C: tl.constexpr, p: tl.constexpr, DENSE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Pixel rows of patches at `start` where `valid`, value * gain - bias in float32; 0 outside -> (rows, COLS)."""
    col = tl.arange(0, COLS)
    gain_col = tl.zeros((COLS,), tl.float32)
    bias_col = tl.zeros((COLS,), tl.float32)
    for c in tl.static_range(C):
        gain_col = tl.where(col % C == c, gain[c], gain_col)
        bias_col = tl.where(col % C == c, bias[c], bias_col)
    step = col if DENSE else (col // C) * stride_w + (col % C) * stride_c
    inside = valid[:, None] & (col < p * C)[None, :]
    value = tl.load(frames_ptr + start[:, None] + step[None, :], mask=inside, other=0).to(tl.float32)
    return tl.where(inside, value * gain_col[None, :] - bias_col[None, :], 0.0)

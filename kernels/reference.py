"""The mathematics of every operation between the matrix products, in plain PyTorch.

Legend: F frames, H W pixels, C channels, p patch side, P patches of a frame, K visible, M masked, D width,
T tokens, N positions, h heads. A patch is a vector of p*p*C values in the order (row, column, channel), channel
fastest: the order of the released model's predictions. Patches of a frame are numbered row by row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_patches(
    frames: Tensor,
    ids: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Selected patches of every frame as normalised vectors, ready for the patch embedding's matrix product.

    Args:
        frames: (F, H, W, C), any strides; uint8 is scaled by 1/255 first, floating point is taken as it is.
        ids: (F, K) integer, patch numbers in 0..P-1.
        mean, std: C values each; the result is (value - mean) / std.
        patch_size: p, dividing H and W.
        dtype: of the result.

    Returns:
        (F, K, p*p*C), `dtype`; the arithmetic is in float32 at least.
    """
    F, H, W, C = frames.shape
    p = patch_size
    grid = frames.reshape(F, H // p, p, W // p, p, C)
    frame = torch.arange(F, device=ids.device)[:, None]
    patches = grid[frame, ids // (W // p), :, ids % (W // p)]  # (F, K, p, p, C)
    scale = 255.0 if frames.dtype == torch.uint8 else 1.0
    work = torch.promote_types(frames.dtype, torch.float32) if frames.is_floating_point() else torch.float32
    gain = 1.0 / (scale * torch.tensor(std, dtype=work, device=frames.device))
    bias = torch.tensor(mean, dtype=work, device=frames.device) * scale * gain
    return (patches.to(work) * gain - bias).flatten(2).to(dtype)


def normalise_patches(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last axis, unbiased variance: the target of the paper's loss."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return (patches - mean) * torch.rsqrt(var + eps)


def patch_loss(
    pred: Tensor,
    frames: Tensor,
    ids: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    norm_pix: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Mean squared error between predictions and the patches they stand for: the training loss.

    Args:
        pred: (F, M, p*p*C) floating point, predictions for the patches `ids`.
        frames, ids, mean, std, patch_size: as in `gather_patches`.
        norm_pix: whether the target is normalised by its own patch's mean and variance.
        eps: added to the variance.

    Returns:
        Scalar, float32 (float64 for float64 predictions): the mean over masked patches and their values.
    """
    work = torch.promote_types(pred.dtype, torch.float32)
    target = gather_patches(frames, ids, mean, std, patch_size, work)
    if norm_pix:
        target = normalise_patches(target, eps)
    return (pred.to(work) - target).square().mean()


def scatter_tokens(visible: Tensor, mask_token: Tensor, visible_ids: Tensor, num_patches: int) -> Tensor:
    """The decoder's input: CLS first, visible tokens at their patches, the mask token everywhere else.

    Args:
        visible: (F, 1 + K, D), CLS first.
        mask_token: D values in any shape.
        visible_ids: (F, K) integer, distinct in a row.
        num_patches: P.

    Returns:
        (F, 1 + P, D), in the dtype of `visible`.
    """
    F, _, D = visible.shape
    place = torch.cat([torch.zeros_like(visible_ids[:, :1]), visible_ids + 1], dim=1)
    tokens = mask_token.to(visible.dtype).reshape(1, 1, D).expand(F, 1 + num_patches, D)
    return tokens.scatter(1, place[:, :, None].expand(-1, -1, D), visible)


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Tokens (F, 1 + P, D), CLS first, at the patches `ids` (F, M) -> (F, M, D)."""
    return tokens.gather(1, (ids + 1)[:, :, None].expand(-1, -1, tokens.shape[-1]))


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) on the two halves of the last axis: the released model's pairing of channels."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def rope_qk(
    qkv: Tensor, positions: Tensor, sin: Tensor, cos: Tensor, num_heads: int, special: str = "keep", parts: str = "qkv"
) -> Tensor:
    """Rotate q and k of a packed projection by the position of their token.

    Args:
        qkv: (T, 3*D), for every token q, k and v, each (heads, D / heads).
        positions: (T,) integer row of the tables; -1 for a token without a position (CLS).
        sin, cos: (N, D / heads) tables, see `fastmum.model.rope`.
        num_heads: h.
        special: what happens to q and k of a token without position: "keep" leaves them as they are, "zero" sets
            them to zero (the released model's treatment of CLS in global blocks).
        parts: what `qkv` packs: "qkv", "kv" or "q".

    Returns:
        As `qkv`, in the dtype of `qkv`; rotation in the wider of its dtype and the tables'.
    """
    T = qkv.shape[0]
    has_place = (positions >= 0)[:, None, None, None]
    row = positions.clamp(min=0)
    idle = 1.0 if special == "keep" else 0.0
    cos_T11d = torch.where(has_place, cos[row][:, None, None, :], idle)
    sin_T11d = torch.where(has_place, sin[row][:, None, None, :], 0.0)
    rotated = len(parts.removesuffix("v"))
    qk, v = qkv.view(T, len(parts), num_heads, -1).split([rotated, len(parts) - rotated], dim=1)
    rotated = qk * cos_T11d + rotate_half(qk) * sin_T11d
    return torch.cat([rotated.to(qkv.dtype), v], dim=1).view_as(qkv)


def add_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """x + update (T, D), and its layer norm with a weight and a bias (D,)."""
    total = x + update
    centred = total - total.mean(-1, keepdim=True)
    return total, centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


def gelu(x: Tensor) -> Tensor:
    """x times the share of the normal distribution below it."""
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Two linear layers, (N, D) and (D, N), with a GELU between them: (T, D) -> (T, D)."""
    return gelu(x @ weight1.t() + bias1) @ weight2.t() + bias2


def rotary_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    sin: Tensor,
    cos: Tensor,
    num_heads: int,
    special: str = "keep",
    parts: str = "qkv",
) -> tuple[Tensor, ...]:
    """x @ weight' + bias, rotated as in `rope_qk`, as one (T, heads, D / heads) tensor for each of the parts."""
    packed = rope_qk(x @ weight.t() + bias, positions, sin, cos, num_heads, special, parts)
    return packed.view(len(x), len(parts), num_heads, -1).unbind(1)


def nearest_bfloat16(x: Tensor) -> Tensor:
    """The values of bfloat16, of 8 binary digits and at least 2^-133 apart, nearest to `x`; halfway away from zero."""
    unit = torch.ldexp(torch.ones_like(x), (torch.frexp(x).exponent - 8).clamp(min=-133))
    nearest = (x.abs() / unit + 0.5).floor() * unit
    return nearest.copysign(x).to(torch.bfloat16)


def adamw(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step number `step`, from 1, of AdamW (Loshchilov and Hutter, algorithm 2): weight and both moments."""
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * grad
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * grad * grad
    mean, square = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    return weight - lr * (weight_decay * weight + mean / (square.sqrt() + eps)), exp_avg, exp_avg_sq

"""Every operation of `fastmum.kernels` in plain PyTorch, in any floating-point dtype: the reference of its tests.

Legend: F frames, H W pixels, C channels, p patch side, P patches of a frame, K visible, M masked, D width,
T tokens, N positions, h heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_patches(
    frames: Tensor, ids: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int, dtype: torch.dtype
) -> Tensor:
    """As `fastmum.kernels.gather_patches`, with frames (F, H, W, C)."""
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
    pred: Tensor, frames: Tensor, ids: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int,
    norm_pix: bool = True, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """As `fastmum.kernels.patch_loss`, with reduction "mean"."""
    work = torch.promote_types(pred.dtype, torch.float32)
    target = gather_patches(frames, ids, mean, std, patch_size, work)
    if norm_pix:
        target = normalise_patches(target, eps)
    return (pred.to(work) - target).square().mean()


def scatter_tokens(visible: Tensor, mask_token: Tensor, visible_ids: Tensor, num_patches: int) -> Tensor:
    """As `fastmum.kernels.scatter_tokens`."""
    F, _, D = visible.shape
    place = torch.cat([visible_ids.new_zeros(F, 1), visible_ids + 1], dim=1)
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
    """As `fastmum.kernels.rope_qk`, with full tables (N, D / h)."""
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
    """x * Phi(x), Phi the cumulative normal distribution."""
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Two linear layers, (N, D) and (D, N), with a GELU between them: (T, D) -> (T, D)."""
    return gelu(x @ weight1.t() + bias1) @ weight2.t() + bias2


def rotary_projection(
    x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, sin: Tensor, cos: Tensor, num_heads: int,
    special: str = "keep", parts: str = "qkv",
) -> tuple[Tensor, ...]:  # fmt: skip
    """x @ weight' + bias, rotated as in `rope_qk`, as one (T, h, D / h) tensor per part."""
    packed = rope_qk(x @ weight.t() + bias, positions, sin, cos, num_heads, special, parts)
    return packed.view(len(x), len(parts), num_heads, -1).unbind(1)


def nearest_bfloat16(x: Tensor) -> Tensor:
    """The nearest bfloat16 value (8 significant bits, at least 2^-133 apart), ties away from zero."""
    unit = torch.ldexp(torch.ones_like(x), (torch.frexp(x).exponent - 8).clamp(min=-133))
    nearest = (x.abs() / unit + 0.5).floor() * unit
    return nearest.copysign(x).to(torch.bfloat16)


def adamw(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, lr: float,
    betas: tuple[float, float], weight_decay: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Step number `step`, from 1, of AdamW (Loshchilov and Hutter, algorithm 2): weight and both moments."""
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * grad
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * grad * grad
    mean, square = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    return weight - lr * (weight_decay * weight + mean / (square.sqrt() + eps)), exp_avg, exp_avg_sq


def polar_steps(x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """a s + b s^3 + c s^5, one after another, of the singular values s of x (n, r, c), divided by 1.01 |x|."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / (1.01 * s.norm(dim=1, keepdim=True))
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return u * s[:, None, :] @ v


def muon_momentum(momentum: Tensor, grad: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The momentum after `grad`, and Nesterov's update."""
    momentum = beta * momentum + (1 - beta) * grad
    return momentum, beta * momentum + (1 - beta) * grad


def local_correlation(a: Tensor, b: Tensor, warp: Tensor, radius: int) -> Tensor:
    """As `fastmum.kernels.local_correlation`: every position of the window is sampled from b (B, C, H, W)."""
    B, C, H, W = a.shape
    x, y = (((warp[:, i].to(a.dtype) + 1) * n - 1) / 2 for i, n in enumerate((W, H)))
    image = torch.arange(B, device=a.device)[:, None, None]
    products = []
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            sampled = torch.zeros_like(a)
            for column in (x.floor() + dx, x.floor() + dx + 1):
                for row in (y.floor() + dy, y.floor() + dy + 1):
                    weight = (1 - (x + dx - column).abs()) * (1 - (y + dy - row).abs())
                    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
                    found = b[image, :, row.clamp(0, H - 1).long(), column.clamp(0, W - 1).long()]
                    sampled = sampled + (found * (weight * inside)[..., None]).permute(0, 3, 1, 2)
            products.append((a * sampled.detach()).sum(1) / C**0.5)
    return torch.stack(products, 1)

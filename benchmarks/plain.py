"""Each operation of `fastmum.kernels` as one writes it in plain PyTorch, without code of fastmum.

They follow the released model (`benchmarks.reference`): all patches are normalised before some are selected, mask
tokens are appended and sorted into place, rotary tables are as large as the tokens.

Legend: F frames, H W pixels, p patch side, P patches of a frame, K visible, M masked, D width, L tokens of a frame,
h heads, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.reference.model import apply_rope
from benchmarks.reference.step import IMAGENET_MEAN, IMAGENET_STD


def _rows(ids: Tensor, width: int) -> Tensor:
    return ids[:, :, None].expand(-1, -1, width)


def all_patches(frames: Tensor, patch_size: int) -> Tensor:
    """(F, H, W, 3) uint8 -> every patch normalised, (F, P, p*p*3) float32."""
    mean, std = (torch.tensor(x, device=frames.device) for x in (IMAGENET_MEAN, IMAGENET_STD))
    images = (frames.float() / 255 - mean) / std
    patches = images.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))  # (F, rows, p, columns, p, 3)
    return patches.transpose(2, 3).flatten(3).flatten(1, 2)


def gather_patches(frames: Tensor, ids: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    """Patches `ids` (F, K) of frames (F, H, W, 3) uint8, normalised -> (F, K, p*p*3)."""
    patches = all_patches(frames, patch_size)
    return patches.gather(1, _rows(ids, patches.shape[-1])).to(dtype)


def patch_loss(pred: Tensor, frames: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """Mean squared distance of predictions (F, M, p*p*3) to the patches `ids`, each normalised separately."""
    target = all_patches(frames, patch_size)
    mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = (target - mean) / (var + 1e-6) ** 0.5
    return ((pred - target.gather(1, _rows(ids, target.shape[-1]))) ** 2).mean()


def scatter_tokens(visible: Tensor, mask_token: Tensor, ids_restore: Tensor) -> Tensor:
    """Visible tokens (F, 1 + K, D), CLS first, and mask tokens, sorted by `ids_restore` (F, P) -> (F, 1 + P, D)."""
    num_frames, num_patches = ids_restore.shape
    masks = mask_token.to(visible.dtype).expand(num_frames, num_patches + 1 - visible.shape[1], -1)
    patches = torch.cat([visible[:, 1:], masks], dim=1)
    patches = patches.gather(1, _rows(ids_restore, patches.shape[-1]))
    return torch.cat([visible[:, :1], patches], dim=1)


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Patches `ids` (F, M) of tokens (F, 1 + P, D), CLS first -> (F, M, D)."""
    return tokens[:, 1:].gather(1, _rows(ids, tokens.shape[-1]))


def rope_qk(qkv: Tensor, sin: Tensor, cos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(F, L, 3*D) and tables (F, h, L - 1, d) -> q, k rotated, and v, (F, h, L, d) each."""
    heads = sin.shape[1]
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return apply_rope(q, (sin, cos)), apply_rope(k, (sin, cos)), v


def rotary_projection(x: Tensor, weight: Tensor, bias: Tensor, sin: Tensor, cos: Tensor) -> tuple[Tensor, ...]:
    """(F, L, D) -> q, k, v of a linear layer, rotated as in `rope_qk`."""
    return rope_qk(F.linear(x, weight, bias), sin, cos)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Linear, GELU (erf), linear."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def add_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The stream (T, D) after an update, and its layer norm, rounded for the next products."""
    x = x + update
    return x, F.layer_norm(x, x.shape[-1:], weight, bias).to(dtype)

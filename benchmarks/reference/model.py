"""The released model in plain PyTorch: what one writes first, and right.

Everything is computed as the released code does it: every patch is embedded and the masked ones are then dropped,
positions are tables as large as the tokens they rotate, mask tokens are appended and sorted into place, every patch is
predicted and the loss takes the masked ones. A batch is B sequences of S views each.

Legend: B sequences, S views, H W pixels, p patch side, L patches of a frame, K visible, N tokens of an attention span,
D width, h heads, d width of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_BASE = 100.0  # released configuration
INIT_STD = 0.02  # released configuration

Rope = tuple[Tensor, Tensor]  # sine and cosine, (B, h, N or N - 1, d) each


class Output(NamedTuple):
    """Results of a training pass.

    Args:
        loss: scalar, mean squared error over the masked patches.
        pred: (B*S, L, 3*p*p), predictions for all patches.
        mask: (B*S, L), 1 where a patch is masked.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor


class RopePositions(nn.Module):
    """Tables of two-dimensional axial rotary positions."""

    periods: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        exponent = 2 * torch.arange(head_dim // 4) / (head_dim // 2)
        self.register_buffer("periods", ROPE_BASE**exponent)

    def forward(self, rows: int, columns: int) -> Rope:
        """Sine and cosine of every patch, (L, d) float32 each."""
        y = (torch.arange(rows, device=self.periods.device) + 0.5) / rows * 2 - 1
        x = (torch.arange(columns, device=self.periods.device) + 0.5) / columns * 2 - 1
        coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
        angles = 2 * math.pi * coords[:, :, None] / self.periods  # (L, 2, d/4)
        angles = angles.flatten(1).repeat(1, 2)
        return angles.sin(), angles.cos()


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a), a and b the halves of a head."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the tokens that have a position in float32; those before them (CLS) stay as they are."""
    sin, cos = rope
    prefix = x.shape[2] - sin.shape[2]
    head, tail = x[:, :, :prefix], x[:, :, prefix:].to(sin.dtype)
    tail = tail * cos + rotate_half(tail) * sin
    return torch.cat([head, tail.to(x.dtype)], dim=2)


class PatchEmbed(nn.Module):
    """(F, C, H, W) -> (F, L, D)."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, rotated queries and keys."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        batch, span, dim = x.shape
        qkv = self.qkv(x).reshape(batch, span, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(apply_rope(q, rope), apply_rope(k, rope), v)
        return self.proj(x.transpose(1, 2).reshape(batch, span, dim))


class Mlp(nn.Module):
    """Linear, GELU (erf), linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class ReferenceMuM(nn.Module):
    """Encoder, multi-view decoder and loss; keys of the `state_dict` as in the released checkpoint.

    Args:
        embed_dim, depth, num_heads: of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder; frame and global blocks alternate, and
            its depth counts both.
        patch_size, in_chans: pixels of a patch's side, channels.
        norm_eps: of every LayerNorm; 1e-5 in the released training configuration.
    """

    def __init__(
        self,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 768,
        decoder_depth: int = 12,
        decoder_num_heads: int = 16,
        patch_size: int = 16,
        in_chans: int = 3,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_heads, self.decoder_num_heads = num_heads, decoder_num_heads
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.rope_embed = RopePositions(embed_dim // num_heads)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.rope_embed_decoder = RopePositions(decoder_embed_dim // decoder_num_heads)
        self.decoder_frame_blocks, self.decoder_global_blocks = (
            nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads, norm_eps) for _ in range(decoder_depth // 2))
            for _ in range(2)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=norm_eps)
        self.decoder_pred = nn.Linear(decoder_embed_dim, in_chans * patch_size**2)
        self.apply(_init_linear)
        nn.init.normal_(self.cls_token, std=INIT_STD)
        nn.init.normal_(self.mask_token, std=INIT_STD)

    def forward(self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> Output:
        """Mask, encode, decode, compare.

        Args:
            images: (B, S, 3, H, W) floating point, ImageNet-normalised; p divides H and W.
            mask_ratio: share of masked patches; int(L * (1 - mask_ratio)) of every frame stay visible.
            noise: (B*S, L); the smallest of a row are visible. None draws it, uniform.
        """
        sequences, views = images.shape[:2]
        images = images.flatten(0, 1)
        grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        num_frames, num_patches = len(images), grid[0] * grid[1]
        if noise is None:
            noise = torch.rand(num_frames, num_patches, device=images.device)
        keep = int(num_patches * (1 - mask_ratio))
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = torch.ones(num_frames, num_patches, device=images.device)
        mask[:, :keep] = 0
        mask = mask.gather(1, ids_restore)

        latent = self.norm(self.encode(images, grid, ids_shuffle[:, :keep]))
        pred = self.decode(latent, ids_restore, grid, sequences, views)
        return Output(self.loss(images, pred, mask), pred, mask)

    def encode(self, images: Tensor, grid: tuple[int, int], ids_keep: Tensor | None = None) -> Tensor:
        """Frames (F, 3, H, W) -> tokens before the last norm, CLS first: of patches `ids_keep` (F, K), or of all."""
        x = self.patch_embed(images)
        rope = tuple(t.expand(len(x), self.num_heads, -1, -1) for t in self.rope_embed(*grid))
        if ids_keep is not None:
            x = x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[-1]))
            ids = ids_keep[:, None, :, None].expand(-1, self.num_heads, -1, rope[0].shape[-1])
            rope = tuple(t.gather(2, ids) for t in rope)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, rope)
        return x

    def decode(self, latent: Tensor, ids_restore: Tensor, grid: tuple[int, int], sequences: int, views: int) -> Tensor:
        """Normed visible tokens (B*S, 1 + K, D) -> predictions for all patches (B*S, L, 3*p*p)."""
        x = self.decoder_embed(latent)
        num_frames, num_patches = ids_restore.shape
        holes = self.mask_token.expand(num_frames, num_patches + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], holes], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], patches], dim=1)

        tables, heads = self.rope_embed_decoder(*grid), self.decoder_num_heads
        frame_rope = tuple(t.expand(num_frames, heads, -1, -1) for t in tables)
        # Sine and cosine of CLS are 0 in global blocks: its query and key are zeroed, as the released weights expect.
        global_rope = tuple(F.pad(t, (0, 0, 1, 0)).repeat(views, 1).expand(sequences, heads, -1, -1) for t in tables)
        span = num_patches + 1
        for frame_block, global_block in zip(self.decoder_frame_blocks, self.decoder_global_blocks, strict=True):
            x = frame_block(x.reshape(sequences * views, span, -1), frame_rope)
            x = global_block(x.reshape(sequences, views * span, -1), global_rope)
        x = self.decoder_norm(x.reshape(num_frames, span, -1))
        return self.decoder_pred(x)[:, 1:]

    def patchify(self, images: Tensor) -> Tensor:
        """(F, 3, H, W) -> (F, L, p*p*3), values of a patch in the order (row, column, channel)."""
        p = self.patch_size
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (F, 3, rows, p, columns, p)
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean over the masked patches of the squared distance to the patch's normalised pixels."""
        target = self.patchify(images)
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)  # unbiased
        target = (target - mean) / (var + 1e-6) ** 0.5
        loss = ((pred - target) ** 2).mean(dim=-1)
        return (loss * mask).sum() / mask.sum()

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """Normed tokens of whole frames (F, 3, H, W), named as in DINOv2: CLS (F, D) and patches (F, L, D)."""
        grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        x = self.norm(self.encode(images, grid))
        return {"x_norm_clstoken": x[:, 0], "x_norm_patchtokens": x[:, 1:]}


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)

"""Reloc3r's decoder, head and loss in plain PyTorch, as its public training code computes them.

Each layer is called for view 1 and for view 2; attention is written out, as in croco. Names of weights are the public
ones.

Legend: B pairs, P patches of a view, E width of the encoder, D of the decoder, h heads, d = D / h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BASE = 100.0
EPS = 1e-6


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate (B, h, P, d) by positions (P, 2): the first half of d by rows, the second by columns."""
    parts = []
    for half, axis in zip(x.chunk(2, dim=-1), (0, 1), strict=True):
        width = half.shape[-1]
        frequencies = 1 / BASE ** (torch.arange(0, width, 2, device=x.device) / width)
        angles = positions[:, axis, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1).to(x.dtype)
        first, second = half.chunk(2, dim=-1)
        parts.append(half * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin())
    return torch.cat(parts, dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Attention of (B, h, P, d) with rotary positions -> (B, P, D)."""
    q, k = rotate(q, positions), rotate(k, positions)
    weights = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, positions))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.projq, self.projk, self.projv = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor, positions: Tensor) -> Tensor:
        layers = (self.projq, x), (self.projk, y), (self.projv, y)
        q, k, v = (layer(z).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for layer, z in layers)
        return self.proj(attend(q, k, v, positions))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DecoderBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_y = (nn.LayerNorm(dim, eps=EPS) for _ in range(4))
        self.attn, self.cross_attn, self.mlp = Attention(dim, num_heads), CrossAttention(dim, num_heads), Mlp(dim)

    def forward(self, x: Tensor, y: Tensor, positions: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), positions)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y), positions)
        return x + self.mlp(self.norm3(x))


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.res_conv1, self.res_conv2, self.res_conv3 = (nn.Conv2d(width, width, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.res_conv1(x))
        y = F.relu(self.res_conv2(y))
        return x + F.relu(self.res_conv3(y))


class PoseHead(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, width)
        self.res_conv = nn.ModuleList(ResidualBlock(width) for _ in range(2))
        self.more_mlps = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.fc_t, self.fc_rot = nn.Linear(width, 3), nn.Linear(width, 9)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(B, P, D) -> rotations (B, 3, 3) and translations (B, 3)."""
        x = self.proj(x).transpose(1, 2).unflatten(2, grid)
        for block in self.res_conv:
            x = block(x)
        x = self.more_mlps(F.adaptive_avg_pool2d(x, 1).flatten(1))
        matrix = F.normalize(self.fc_rot(x).view(-1, 3, 3), dim=2)
        U, _, V = torch.svd(matrix.transpose(1, 2))
        signs = torch.ones(len(matrix), 3, 1, device=x.device)
        signs[:, 2, 0] = torch.det(V @ U.transpose(1, 2))
        return (V * signs.transpose(1, 2)) @ U.transpose(1, 2), self.fc_t(x)


class ReferenceReloc3r(nn.Module):
    """Tokens of the encoder of both views -> pose of view 1 in view 2, and of view 2 in view 1."""

    def __init__(self, encoder_dim: int, head_dim: int, embed_dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.decoder_embed = nn.Linear(encoder_dim, embed_dim)
        self.dec_blocks = nn.ModuleList(DecoderBlock(embed_dim, num_heads) for _ in range(depth))
        self.dec_norm = nn.LayerNorm(embed_dim, eps=EPS)
        self.pose_head = PoseHead(embed_dim, head_dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
        """(2 B, P, E), first all of view 1, then of view 2."""
        axes = (torch.arange(n, device=tokens.device) for n in grid)
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        one, two = self.decoder_embed(tokens).chunk(2)
        for block in self.dec_blocks:
            one, two = block(one, two, positions), block(two, one, positions)
        poses = []
        for x in (one, two):
            with torch.autocast(x.device.type, enabled=False):
                poses.append(self.pose_head(self.dec_norm(x).float(), grid))
        return poses


def pose_loss(poses: list[tuple[Tensor, Tensor]], world_from_camera: tuple[Tensor, Tensor]) -> Tensor:
    """Sum over both directions of the mean angles of direction and rotation, radians."""
    T_1, T_2 = world_from_camera
    loss = torch.zeros((), device=T_1.device)
    for (R, t), T in zip(poses, (torch.linalg.inv(T_2) @ T_1, torch.linalg.inv(T_1) @ T_2), strict=True):
        a, b = (x / (x.norm(dim=1, keepdim=True) + EPS) for x in (t, T[:, :3, 3]))
        loss = loss + (a * b).sum(1).clamp(EPS - 1, 1 - EPS).acos().mean()
        trace = (R.transpose(1, 2) @ T[:, :3, :3]).diagonal(dim1=1, dim2=2).sum(1)
        loss = loss + ((trace - 1) / 2).clamp(EPS - 1, 1 - EPS).acos().mean()
    return loss

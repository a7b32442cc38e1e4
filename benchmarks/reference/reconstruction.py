"""VGGT's aggregator, heads and losses in plain PyTorch, as its public training code computes them.

A batch is B sequences of S frames each; every block of the aggregator is recomputed in the backward pass, invalid
pixels are removed by indexing, and the largest residuals by a quantile. Names of weights are the public ones.

Legend: B sequences, S frames, (h, w) patches, P tokens of a frame, C width, (H, W) pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LIMIT = 100.0


class Outputs(NamedTuple):
    """Predictions of all frames."""

    cameras: list[Tensor]  # (B, S, 9) of each iteration
    depth: Tensor  # (B, S, H, W, 1)
    depth_conf: Tensor  # (B, S, H, W)
    points: Tensor  # (B, S, H, W, 3)
    points_conf: Tensor  # (B, S, H, W)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        batch, span, dim = x.shape
        qkv = self.qkv(x).reshape(batch, span, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if positions is not None:
            q, k = rotate(q, positions), rotate(k, positions)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, span, dim))


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate (B, heads, N, d) by positions (B, N, 2): the first half of d by rows, the second by columns."""
    parts = []
    for half, axis in zip(x.chunk(2, dim=-1), (0, 1), strict=True):
        d = half.shape[-1]
        frequencies = 1 / 100 ** (torch.arange(0, d, 2, device=x.device) / d)
        angles = positions[:, None, :, axis, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        a, b = half.chunk(2, dim=-1)
        parts.append(half * angles.cos() + torch.cat([-b, a], dim=-1) * angles.sin())
    return torch.cat(parts, dim=-1)


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, num_heads, qk_norm), Mlp(dim, 4 * dim, dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), positions))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Aggregator(nn.Module):
    def __init__(self, encoder_dim: int, dim: int, pairs: int, num_heads: int, registers: int) -> None:
        super().__init__()
        self.proj = nn.Linear(encoder_dim, dim) if encoder_dim != dim else nn.Identity()
        self.camera_token = nn.Parameter(1e-6 * torch.randn(1, 2, 1, dim))
        if registers:
            self.register_token = nn.Parameter(1e-6 * torch.randn(1, 2, registers, dim))
        self.registers = registers
        self.frame_blocks = nn.ModuleList(Block(dim, num_heads, True) for _ in range(pairs))
        self.global_blocks = nn.ModuleList(Block(dim, num_heads, True) for _ in range(pairs))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """Encoder tokens (B, S, h * w, E) -> the output of each pair (B, S, P, 2C)."""
        B, S = tokens.shape[:2]
        special = [self.camera_token, *([self.register_token] if self.registers else [])]
        first = [torch.cat([t[:, :1], t[:, 1:].expand(-1, S - 1, -1, -1)], 1).expand(B, -1, -1, -1) for t in special]
        x = torch.cat([*first, self.proj(tokens)], dim=2)
        P, C = x.shape[2:]
        rows, columns = torch.meshgrid(*(torch.arange(n, device=x.device) + 1 for n in grid), indexing="ij")
        places = torch.stack([rows, columns], -1).reshape(-1, 2)
        places = torch.cat([places.new_zeros(1 + self.registers, 2), places])
        within, across = places.expand(B * S, -1, -1), places.repeat(S, 1).expand(B, -1, -1)
        outputs = []
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = checkpoint(frame_block, x.reshape(B * S, P, C), within, use_reentrant=False)
            inner = x.reshape(B, S, P, C)
            x = checkpoint(global_block, x.reshape(B, S * P, C), across, use_reentrant=False)
            outputs.append(torch.cat([inner, x.reshape(B, S, P, C)], dim=-1))
        return outputs


class CameraHead(nn.Module):
    def __init__(self, dim: int, num_heads: int, blocks: int, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations
        self.token_norm, self.trunk_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.trunk = nn.Sequential(*(Block(dim, num_heads, False) for _ in range(blocks)))
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, 9))
        self.embed_pose = nn.Linear(9, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.adaln_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.pose_branch = Mlp(dim, dim // 2, 9)

    def forward(self, last: Tensor) -> list[Tensor]:
        tokens = self.token_norm(last[:, :, 0])
        estimate, outputs = None, []
        for _ in range(self.iterations):
            if estimate is None:
                embedded = self.embed_pose(self.empty_pose_tokens.expand(*tokens.shape[:2], -1))
            else:
                estimate = estimate.detach()
                embedded = self.embed_pose(estimate)
            shift, scale, gate = self.poseLN_modulation(embedded).chunk(3, dim=-1)
            x = tokens + gate * (self.adaln_norm(tokens) * (1 + scale) + shift)
            delta = self.pose_branch(self.trunk_norm(self.trunk(x)))
            estimate = delta if estimate is None else estimate + delta
            outputs.append(torch.cat([estimate[..., :7], F.relu(estimate[..., 7:])], dim=-1))
        return outputs


class ResidualUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)  # in place in the public code: the sum adds it
        return self.conv2(F.relu(self.conv1(x))) + x


class Fusion(nn.Module):
    def __init__(self, channels: int, has_skip: bool) -> None:
        super().__init__()
        if has_skip:
            self.resConfUnit1 = ResidualUnit(channels)
        self.resConfUnit2 = ResidualUnit(channels)
        self.out_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int] | None) -> Tensor:
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        x = self.resConfUnit2(x)
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.out_conv(F.interpolate(x, size, mode="bilinear", align_corners=True))


class Dpt(nn.Module):
    def __init__(self, dim: int, outputs: int, activation: str, features: int, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.activation, self.norm = activation, nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, channels, 1) for channels in levels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(levels[0], levels[0], 4, 4), nn.ConvTranspose2d(levels[1], levels[1], 2, 2),
                nn.Identity(), nn.Conv2d(levels[3], levels[3], 3, 2, 1),
            ]
        )  # fmt: skip
        self.scratch = nn.Module()
        for i, channels in enumerate(levels, 1):
            self.scratch.add_module(f"layer{i}_rn", nn.Conv2d(channels, features, 3, padding=1, bias=False))
            self.scratch.add_module(f"refinenet{i}", Fusion(features, i < 4))
        self.scratch.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.scratch.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, outputs + 1, 1)
        )

    def forward(self, taps: list[Tensor], grid: tuple[int, int], patch_size: int) -> tuple[Tensor, Tensor]:
        B, S = taps[0].shape[:2]
        height, width = grid[0] * patch_size, grid[1] * patch_size
        scratch, skips = self.scratch, []
        for i, tap in enumerate(taps):
            x = self.norm(tap[:, :, -grid[0] * grid[1] :].flatten(0, 1))
            x = self.projects[i](x.transpose(1, 2).reshape(B * S, -1, *grid))
            x = self.resize_layers[i](x + embedding(x, width / height))
            skips.append(getattr(scratch, f"layer{i + 1}_rn")(x))
        x = scratch.refinenet4(skips[3], None, skips[2].shape[2:])
        x = scratch.refinenet3(x, skips[2], skips[1].shape[2:])
        x = scratch.refinenet2(x, skips[1], skips[0].shape[2:])
        x = scratch.output_conv1(scratch.refinenet1(x, skips[0], None))
        x = F.interpolate(x, (height, width), mode="bilinear", align_corners=True)
        x = scratch.output_conv2(x + embedding(x, width / height)).permute(0, 2, 3, 1)
        values, conf = x[..., :-1], 1 + x[..., -1].exp()
        values = values.exp() if self.activation == "exp" else values.sign() * (values.abs().exp() - 1)
        return values.unflatten(0, (B, S)), conf.unflatten(0, (B, S))


def embedding(x: Tensor, aspect: float) -> Tensor:
    """0.1 times sines and cosines of image coordinates, for a map (F, c, h, w)."""
    channels, height, width = x.shape[1:]
    diagonal = math.sqrt(aspect**2 + 1)
    ends = aspect / diagonal * (width - 1) / width, 1 / diagonal * (height - 1) / height
    u, v = (torch.linspace(-e, e, n, dtype=torch.float64) for e, n in zip(ends, (width, height), strict=True))
    omega = 1 / 100 ** (torch.arange(channels // 4, dtype=torch.float64) / (channels / 4))
    parts = []
    for coordinate in (u[None].expand(height, -1), v[:, None].expand(-1, width)):
        angles = coordinate[None] * omega[:, None, None]
        parts += [angles.sin(), angles.cos()]
    return 0.1 * torch.cat(parts).to(x)


class ReferenceVGGT(nn.Module):
    """Aggregator and heads. Sizes as in `ReconstructionConfig`."""

    def __init__(
        self, encoder_dim: int, embed_dim: int, pairs: int, num_heads: int, registers: int, patch_size: int,
        taps: tuple[int, ...], dpt_features: int, dpt_levels: tuple[int, ...], camera_heads: int, camera_blocks: int,
        camera_iterations: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_size, self.taps = patch_size, taps
        self.aggregator = Aggregator(encoder_dim, embed_dim, pairs, num_heads, registers)
        self.camera_head = CameraHead(2 * embed_dim, camera_heads, camera_blocks, camera_iterations)
        self.depth_head = Dpt(2 * embed_dim, 1, "exp", dpt_features, dpt_levels)
        self.point_head = Dpt(2 * embed_dim, 3, "inv_log", dpt_features, dpt_levels)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Outputs:
        """Encoder tokens (B, S, h * w, E); matrix products of the aggregator follow the autocast of the caller."""
        pairs = self.aggregator(tokens, grid)
        with torch.autocast(tokens.device.type, enabled=False):
            pairs = [pair.float() if pair.dtype == torch.bfloat16 else pair for pair in pairs]
            taps = [pairs[i] for i in self.taps]
            dense = *self.depth_head(taps, grid, self.patch_size), *self.point_head(taps, grid, self.patch_size)
            return Outputs(self.camera_head(pairs[-1]), *dense)


def clean(x: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x), x, torch.zeros_like(x)).clamp(-LIMIT, LIMIT)


def losses_of(outputs: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Terms and `objective` of a normalised batch: cameras (B, S, 9), depth, points, and mask (B, S, H, W)."""
    mask = batch["mask"]
    seen = mask[:, 0].sum((-1, -2)) > 100
    translation = rotation = fov = outputs.depth.sum() * 0
    for i, cameras in enumerate(outputs.cameras):
        if seen.any():
            weight = 0.6 ** (len(outputs.cameras) - 1 - i) / len(outputs.cameras)
            error = clean((cameras[seen] - batch["cameras"][seen]).abs())
            translation = translation + weight * error[..., :3].mean()
            rotation = rotation + weight * error[..., 3:7].mean()
            fov = fov + weight * error[..., 7:].mean()
    camera = translation + rotation + 0.5 * fov
    depth = _dense(outputs.depth, outputs.depth_conf, clean(batch["depth"])[..., None], mask, _depth_gradient)
    points = _dense(outputs.points, outputs.points_conf, clean(batch["points"]), mask, _normals_loss)
    objective = 5 * camera + sum(depth) + sum(points)
    return {
        "translation": translation, "rotation": rotation, "fov": fov, "camera": camera, "objective": objective,
        **{f"depth_{name}": x for name, x in zip(("confidence", "error", "gradient"), depth, strict=True)},
        **{f"points_{name}": x for name, x in zip(("confidence", "error", "gradient"), points, strict=True)},
    }  # fmt: skip


def _dense(values, conf, target, mask, gradient) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    if mask.sum() < 100:
        zero = values.sum() * 0
        return zero, zero, zero
    residual = clean((target[mask] - values[mask]).norm(dim=-1))
    weighted = clean(residual * conf[mask] - 0.2 * conf[mask].log())
    maps = (x.flatten(0, 1) for x in (values, target, mask))
    return _filtered(weighted).mean(), _filtered(residual).mean(), gradient(*maps)


def _filtered(values: Tensor) -> Tensor:
    if len(values) <= 1000:
        return values
    values = values.clamp(max=LIMIT)
    rank = round(0.98 * (len(values) - 1))
    below = values[values < values.detach().kthvalue(rank + 1).values]
    return below if len(below) > 1000 else values


def _depth_gradient(depth: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    total = depth.sum() * 0
    for stride in (1, 2, 4, 8):
        d, t, m = (x[:, ::stride, ::stride] for x in (depth[..., 0], target[..., 0], mask.float()))
        if m.sum() == 0:
            continue
        error = (d - t) * m
        x = ((error[:, :, 1:] - error[:, :, :-1]).abs() * m[:, :, 1:] * m[:, :, :-1]).clamp(max=LIMIT)
        y = ((error[:, 1:] - error[:, :-1]).abs() * m[:, 1:] * m[:, :-1]).clamp(max=LIMIT)
        total = total + (x.sum() + y.sum()) / m.sum()
    return total / 4


def _normals_loss(points: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    total = points.sum() * 0
    for stride in (1, 2, 4):
        p, t, m = (x[:, ::stride, ::stride] for x in (points, target, mask))
        (a, valid), (b, _) = _normals(p, m), _normals(t, m)
        if valid.sum() >= 10:
            cosine = (a[valid] * b[valid]).sum(-1).clamp(-1 + 1e-8, 1 - 1e-8)
            total = total + clean(1 - cosine).mean()
    return total / 3


def _normals(points: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    p, m = F.pad(points, (0, 0, 1, 1, 1, 1)), F.pad(mask, (1, 1, 1, 1))
    around = [(p[:, y : y + points.shape[1], x : x + points.shape[2]] - points,
               m[:, y : y + points.shape[1], x : x + points.shape[2]] & mask)
              for y, x in ((0, 1), (1, 0), (2, 1), (1, 2))]  # fmt: skip
    normals, valid = [], []
    for i in range(4):
        (a, known_a), (b, known_b) = around[i], around[(i + 1) % 4]
        normals.append(torch.cross(a, b, dim=-1))
        valid.append(known_a & known_b)
    return F.normalize(torch.stack(normals), dim=-1, eps=1e-8), torch.stack(valid)

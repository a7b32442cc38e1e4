"""Coarse matching: Gaussian process, transformer and anchors.

Legend: B pairs, (h, w) coarse maps, P = h w positions, C channels, A anchors.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 0.2  # of the exponential cosine kernel (RoMa)
NOISE = 0.1  # on the diagonal of the kernel matrix
EPS = 1e-6  # added to the product of norms
FREQUENCY = 8 * math.pi  # of the coordinates' Fourier features


def grid(size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Centres of the pixels of a map of size (h, w), (1, 2, h, w) float32: x and y in [-1, 1]."""
    h, w = size
    x, y = (torch.linspace(-1 + 1 / n, 1 - 1 / n, n, device=device) for n in (w, h))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))[None]


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp((cos - 1) / temperature) of features (B, P, C) and (B, Q, C) -> (B, P, Q)."""
    norms = x.norm(dim=-1)[:, :, None] * y.norm(dim=-1)[:, None]
    return ((x @ y.mT / (norms + EPS) - 1) / TEMPERATURE).exp()


class GP(nn.Module):
    """Posterior mean of Fourier features of the coordinates in `b`, given its features, at the features of `a`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pos_conv = nn.Conv2d(2, dim, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Maps (B, C, h, w) float32 -> (B, dim, h, w). An explicit inverse in training, as in RoMa, else Cholesky."""
        coordinates = (FREQUENCY * self.pos_conv(grid(b.shape[2:], b.device))).cos().flatten(2).mT
        x, y = a.flatten(2).mT, b.flatten(2).mT
        matrix = kernel(y, y) + NOISE * torch.eye(y.shape[1], device=y.device)
        # The variants without a check of the result do not wait for the device.
        if self.training:
            solved = torch.linalg.inv_ex(matrix).inverse @ coordinates
        else:
            solved = torch.cholesky_solve(coordinates.expand(len(y), -1, -1), torch.linalg.cholesky_ex(matrix).L)
        return (kernel(x, y) @ solved).mT.unflatten(2, a.shape[2:])


class Attention(nn.Module):
    """Self-attention without positions; q, k and v have no bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block, pre-norm, without LayerScale."""

    compiled_compute = None

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        return (self.compiled_compute or Block._compute)(self, x)

    def _compute(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class CoarseDecoder(nn.Module):
    """Posterior means and features -> logits of anchors, and of the certainty."""

    def __init__(self, dim: int, num_heads: int, blocks: int, anchors: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(dim, num_heads) for _ in range(blocks)))
        self.to_out = nn.Linear(dim, anchors + 1)

    def forward(self, posterior: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D, h, w) and (B, C, h, w) -> (B, A, h, w) and (B, 1, h, w), float32."""
        x = self.blocks(torch.cat([posterior, features], 1).flatten(2).mT)
        with torch.autocast(x.device.type, enabled=False):
            out = self.to_out(x.float()).mT.unflatten(2, posterior.shape[2:])
        return out[:, :-1], out[:, -1:]


@torch.no_grad()
def anchor_flow(logits: Tensor) -> Tensor:
    """Warp (B, 2, h, w) from logits (B, side^2, h, w) of anchors, row by row.

    The mean of the best anchor and its neighbours, weighted by their probability. As in RoMa the neighbours are the
    anchors before and after in the list, so at the edge they may be in another row.
    """
    A = logits.shape[1]
    side = math.isqrt(A)
    anchors = grid((side, side), logits.device)[0].flatten(1)  # (2, A)
    best = logits.argmax(1, keepdim=True)
    index = torch.cat([best + shift for shift in (-1, 0, 1, -side, side)], 1).clamp(0, A - 1)
    weights = logits.softmax(1).gather(1, index)
    return (weights * anchors[:, index]).sum(2).transpose(0, 1) / weights.sum(1, keepdim=True)

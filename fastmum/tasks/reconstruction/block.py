"""The transformer block of aggregator and camera head: LayerScale, and perhaps norms of q and k and rotary positions.

Legend: T = F * L packed tokens, F frames, L tokens of a frame, D width, h heads, d = D / h.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmum.model.block import apply_linear
from fastmum.model.config import MLP_RATIO

LAYER_SCALE = 0.01  # initial value of VGGT's blocks
ROPE_BASE = 100.0  # VGGT
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (T, h, d) each -> (T, h, d)


class Rotation(NamedTuple):
    """Sines and cosines of the tokens of a frame, (L, 1, 2, d / 4) each: of rows and of columns."""

    sin: Tensor
    cos: Tensor

    @classmethod
    def of_grid(cls, rows: int, columns: int, special: int, head_dim: int, device: torch.device) -> "Rotation":
        """The patch in row i, column j is at (i + 1, j + 1), special tokens, which come first, at (0, 0).

        The angle of channel k < d / 4 is the coordinate times 100**(-2k / (d / 2)).
        """
        numbers = (torch.arange(1, n + 1, device=device) for n in (rows, columns))
        positions = torch.stack(torch.meshgrid(*numbers, indexing="ij"), -1).flatten(0, 1)  # (P, 2)
        positions = torch.cat([positions.new_zeros(special, 2), positions])
        exponent = torch.arange(head_dim // 4, device=device) / (head_dim // 4)
        angles = positions[:, None, :, None] / ROPE_BASE**exponent
        return cls(angles.sin(), angles.cos())

    def rotate(self, x_TN: Tensor) -> Tensor:
        """Rotate q or k (T, h, d): the first half of d by rows, the second by columns, channel c with c + d / 4."""
        x = x_TN.unflatten(2, (2, 2, -1)).unflatten(0, (-1, len(self.sin)))  # (F, L, h, axis, half, d / 4)
        first, second = x.unbind(-2)
        sin, cos = self.sin.to(x.dtype), self.cos.to(x.dtype)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -2)
        return turned.flatten(0, 1).flatten(2)


class LayerScale(nn.Module):
    """A learned factor for every channel."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention; with `qk_norm`, q and k have a LayerNorm over the channels of each head, before the rotation."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_TD: Tensor, attend: Attend, rotation: Rotation | None) -> Tensor:
        q, k, v = apply_linear(self.qkv, x_TD).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = self.q_norm(q.to(wide)), self.k_norm(k.to(wide))
        if rotation is not None:
            q, k = rotation.rotate(q), rotation.rotate(k)
        return apply_linear(self.proj, attend(q.to(v.dtype), k.to(v.dtype), v).flatten(1))


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(self.fc2, nn.functional.gelu(apply_linear(self.fc1, x)))


class Block(nn.Module):
    """x + scale * attention(norm(x)), then x + scale * mlp(norm(x)); the stream keeps the dtype of the parameters."""

    compiled_compute: Callable[..., Tensor] | None = None  # compiled `_compute`

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.ls1 = LayerScale(dim, LAYER_SCALE)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, MLP_RATIO * dim, dim)
        self.ls2 = LayerScale(dim, LAYER_SCALE)

    def forward(self, x_TD: Tensor, attend: Attend, rotation: Rotation | None = None) -> Tensor:
        # The compiled part excludes the module's hooks, where FSDP gathers weights.
        return (self.compiled_compute or Block._compute)(self, x_TD, attend, rotation)

    def _compute(self, x_TD: Tensor, attend: Attend, rotation: Rotation | None) -> Tensor:
        x_TD = x_TD + self.ls1(self.attn(self.norm1(x_TD), attend, rotation))
        return x_TD + self.ls2(self.mlp(self.norm2(x_TD)))

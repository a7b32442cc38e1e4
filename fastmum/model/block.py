"""The pre-norm transformer block that encoder and decoder share.

Tokens travel packed, (T, D), whatever frames and sequences they belong to. What differs between the encoder, frame
blocks and global blocks is who attends to whom and where tokens stand: that is a `Context`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmum.kernels import gather_tokens, rope_qk
from fastmum.model.config import MLP_RATIO
from fastmum.model.rope import rotate_rounded


@dataclass(frozen=True)
class Asking:
    """The tokens that ask, where the output of a block is wanted for some patches only. All are seen.

    Args:
        ids: (F, M) patch numbers, M of every frame.
        positions: (F * M,) the same, packed.
    """

    ids: Tensor
    positions: Tensor

    def take(self, x_TD: Tensor) -> Tensor:
        """Tokens of the patches `ids`, (F * M, D)."""
        return gather_tokens(x_TD.unflatten(0, (len(self.ids), -1)), self.ids).flatten(0, 1)


@dataclass(frozen=True)
class Context:
    """What a stack of blocks needs to know about its tokens.

    Args:
        attend: q, k, v, each (T, h, D / h) -> (T, h, D / h); decides who sees whom.
        positions: (T,) int64, patch number of every token, -1 for CLS.
        sin, cos: (P, D / h) tables of `AxialRope`.
        special: what becomes of q and k of CLS, see `rope_qk`.
        asking: the tokens that a block returns, None for all.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    positions: Tensor
    sin: Tensor
    cos: Tensor
    special: Literal["keep", "zero"]
    asking: Asking | None = None


def packed(x_FLD: Tensor) -> Tensor:
    """New tokens of every frame, (F, L, D), as (T, D) for a stack of blocks.

    Not by `flatten`: the first block would be given a view and the others not, and compile for each.
    """
    return torch.ops.aten._unsafe_view(x_FLD, [x_FLD.shape[0] * x_FLD.shape[1], x_FLD.shape[2]])


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions, biases everywhere."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        if context.asking is None:
            qkv = self._rotate(self.qkv(x_TD), context.positions, context, "qkv")
            q, k, v = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        else:
            # Rows of the weight are q, k, v; splitting them is a view.
            (w_q, w_kv), (b_q, b_kv) = (x.tensor_split([len(x) // 3]) for x in (self.qkv.weight, self.qkv.bias))
            q = F.linear(context.asking.take(x_TD), w_q, b_q)
            q = self._rotate(q, context.asking.positions, context, "q").unflatten(1, (self.num_heads, -1))
            kv = self._rotate(F.linear(x_TD, w_kv, b_kv), context.positions, context, "kv")
            k, v = kv.unflatten(1, (2, self.num_heads, -1)).unbind(1)
        return self.proj(context.attend(q, k, v).flatten(1))

    def _rotate(self, x: Tensor, positions: Tensor, context: Context, parts: str) -> Tensor:
        if context.sin.itemsize < 4 <= x.itemsize:  # as the released encoder by itself
            return rotate_rounded(x, positions, context.sin, context.cos, self.num_heads, parts)
        # In place: the linear layer's backward pass does not need its output.
        return rope_qk(
            x, positions, context.sin, context.cos, self.num_heads, context.special, inplace=True, parts=parts
        )


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_TD)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    compiled_compute: Callable[..., Tensor] | None = None  # `_compute`, where it is compiled

    def __init__(self, dim: int, num_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim)

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        """(T, D) -> (T, D), or the tokens of `context.asking` alone."""
        # Compiled without the hooks around it: FSDP gathers weights there.
        compute = self.compiled_compute or Block._compute
        return compute(self, x_TD, context)

    def _compute(self, x_TD: Tensor, context: Context) -> Tensor:
        attended = self.attn(self.norm1(x_TD), context)
        x_TD = (x_TD if context.asking is None else context.asking.take(x_TD)) + attended
        return x_TD + self.mlp(self.norm2(x_TD))

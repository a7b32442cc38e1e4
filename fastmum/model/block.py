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

from fastmum.kernels import add_norm, gather_tokens, linear, mlp, rope_qk, rotary_projection
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


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """What products with a parameter are computed in: autocast's choice where it is on, else the parameter's own."""
    device = parameter.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype


def packed(x_FLD: Tensor) -> Tensor:
    """New tokens of every frame, (F, L, D), as (T, D) for a stack of blocks.

    Not by `flatten`: the first block would be given a view and the others not, and compile for each.
    """
    return torch.ops.aten._unsafe_view(x_FLD, [x_FLD.shape[0] * x_FLD.shape[1], x_FLD.shape[2]])


def is_plain(layer: nn.Linear) -> bool:
    """Whether a layer multiplies by its weight as that is; in float8 it has products of its own."""
    return type(layer) is nn.Linear


def computed(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer's output as autocast computes it, or in the dtype of its weight."""
    dtype = compute_dtype(layer.weight)
    return linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


def linear_but_bias_gradient(layer: nn.Linear, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output, and its bias for `add_norm`, which makes that one's gradient (unless a float8 layer does)."""
    dtype = compute_dtype(layer.weight)
    weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
    if is_plain(layer):
        return linear(x_TD, weight, bias.detach()), bias
    return layer(x_TD), bias.detach()


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions, biases everywhere."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_TD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Normed tokens (T, D) -> what to add to the stream, (T, D) or of the tokens that ask; bias for `add_norm`."""
        asking = context.asking
        if asking is None:
            q, k, v = self._project(x_TD, context.positions, context, "qkv")
        else:
            (q,) = self._project(asking.take(x_TD), asking.positions, context, "q")
            k, v = self._project(x_TD, context.positions, context, "kv")
        return linear_but_bias_gradient(self.proj, context.attend(q, k, v).flatten(1))

    def _project(self, x_TD: Tensor, positions: Tensor, context: Context, parts: str) -> tuple[Tensor, ...]:
        rotation = positions, context.sin, context.cos, self.num_heads
        if parts == "qkv" and not is_plain(self.qkv):
            # In place: the linear layer's backward pass does not need its output.
            packed = rope_qk(self.qkv(x_TD), *rotation, context.special, inplace=True)
            return packed.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        # Rows of the weight are q, k, v; a part of them is a view.
        width = self.qkv.in_features
        rows = slice(width if parts == "kv" else 0, width if parts == "q" else None)
        weight, bias = (p[rows].to(compute_dtype(p)) for p in (self.qkv.weight, self.qkv.bias))
        x_TD = x_TD.to(weight.dtype)
        if context.sin.itemsize < 4 <= x_TD.itemsize:  # as the released encoder by itself
            packed = rotate_rounded(F.linear(x_TD, weight, bias), *rotation, parts)
            return packed.unflatten(1, (len(parts), self.num_heads, -1)).unbind(1)
        return rotary_projection(x_TD, weight, bias, *rotation, context.special, parts)


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between.

    `keep` says what the backward pass finds, see `fastmum.kernels.mlp`.
    """

    keep: Literal["all", "hidden", "input"] = "all"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Normed tokens (T, D) -> what is added to the stream, (T, D); bias for `add_norm`."""
        if not (is_plain(self.fc1) and is_plain(self.fc2)):
            return linear_but_bias_gradient(self.fc2, F.gelu(self.fc1(x_TD)))
        dtype = compute_dtype(self.fc1.weight)
        weight1, bias1, weight2, bias2 = (
            p.to(dtype) for p in (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        )
        return mlp(x_TD.to(dtype), weight1, bias1, weight2, bias2, self.keep), bias2


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    The sum that ends a block and the norm that begins the next are one operation, so blocks hand on both the stream
    and its norm.
    """

    compiled_compute: Callable[..., tuple[Tensor, Tensor]] | None = None  # `_compute`, where it is compiled

    def __init__(self, dim: int, num_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim)

    def forward(
        self, x_TD: Tensor, normed_TD: Tensor, context: Context, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step of the stream.

        Args:
            x_TD: the stream, (T, D).
            normed_TD: its `norm1`, (T, D).
            context: who sees whom.
            weight, bias: (D,) of the norm behind this block; its epsilon is this block's.

        Returns:
            The stream and its norm behind this block, (T, D) or the tokens of `context.asking` alone.
        """
        # Compiled without the hooks around it: FSDP gathers weights there.
        compute = self.compiled_compute or Block._compute
        return compute(self, x_TD, normed_TD, context, weight, bias)

    def _compute(
        self, x_TD: Tensor, normed_TD: Tensor, context: Context, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        eps = self.norm2.eps
        x_TD = x_TD if context.asking is None else context.asking.take(x_TD)
        x_TD, normed_TD = add_norm(x_TD, *self.attn(normed_TD, context), self.norm2.weight, self.norm2.bias, eps)
        return add_norm(x_TD, *self.mlp(normed_TD), weight, bias, eps)

"""The pre-norm transformer block of encoder and decoder, and its rotary positions.

Tokens are packed, (T, D), over frames and sequences. A `Context` says which tokens attend to which and where they are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmum.kernels import add_norm, gather_tokens, linear, mlp, rope_qk, rotary_projection
from fastmum.model.config import MLP_RATIO
from fastmum.model.options import DEFAULT, Coordinates, EncoderOptions

BASE = 100.0  # released configuration


class AxialRope(nn.Module):
    """Two-dimensional axial rotary position encoding, as in the released model; periods are a buffer of the checkpoint.

    A patch in row i of h, column j of w has the coordinates 2(i + 0.5)/h - 1 and 2(j + 0.5)/w - 1. Each is turned into
    angles 2 pi * coordinate / period with the periods base**(2k / (d/2)), k < d/4, d the width of a head. The d/4 row
    angles are followed by the d/4 column angles, and both are repeated: channel c is rotated with channel c + d/2.

    The released encoder without its decoder computes positions in bfloat16, from the periods to the rotated q and k;
    with its decoder, in float32. The dtype of the periods selects one: `rope.to(torch.bfloat16)`.

    Other encoders have `coordinates` "whole", row i and column j, whose angles are coordinate / period (CroCo), or
    "none", whose angles are 0.
    """

    periods: Tensor

    def __init__(self, head_dim: int, coordinates: Coordinates = "centre") -> None:
        super().__init__()
        self.head_dim, self.coordinates = head_dim, coordinates
        self.register_buffer("periods", torch.empty(head_dim // 4, dtype=torch.float32))

    def init_weights(self) -> None:
        """Set the periods to base**(2k / (d/2))."""
        self.periods.copy_(rope_periods(self.head_dim, device=self.periods.device))

    def tables(self, rows: int, columns: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Sines and cosines of all patches, row by row, (rows * columns, head_dim) in the periods' dtype.

        Coordinates are multiplied by `factor`.
        """
        dtype, device = self.periods.dtype, self.periods.device
        if self.coordinates == "centre":
            y = torch.arange(0.5, rows, dtype=dtype, device=device) / rows * 2 - 1
            x = torch.arange(0.5, columns, dtype=dtype, device=device) / columns * 2 - 1
        else:
            y, x = (torch.arange(n, dtype=dtype, device=device) for n in (rows, columns))
        coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
        coords = coords if factor == 1.0 else coords * factor
        turns = {"centre": 2 * math.pi, "whole": 1.0, "none": 0.0}[self.coordinates]
        angles = turns * coords[:, :, None] / self.periods  # (N, 2, d/4)
        angles = angles.flatten(1).tile(2)  # (N, d)
        return angles.sin(), angles.cos()


def rope_periods(head_dim: int, base: float = BASE, device: torch.device | None = None) -> Tensor:
    """Periods base**(2k / (d/2)), k < d/4, of the rotary positions of a head of width d, (d/4,) float32."""
    return base ** (2 * torch.arange(head_dim // 4, device=device) / (head_dim // 2))


def rotate_rounded(qkv: Tensor, positions: Tensor, sin: Tensor, cos: Tensor, num_heads: int, parts: str) -> Tensor:
    """`rope_qk` with special "keep" and q, k, both products and their sum rounded to the dtype of the tables (N, d)."""
    heads = qkv.unflatten(1, (-1, sin.shape[1]))
    turned, rest = heads.tensor_split([num_heads * len(parts.removesuffix("v"))], dim=1)
    # Position -1 takes the last row: no rotation.
    sin, cos = torch.cat([sin, sin.new_zeros(1, sin.shape[1])]), torch.cat([cos, cos.new_ones(1, cos.shape[1])])
    sin, cos = (table[positions][:, None] for table in (sin, cos))
    turned = turned.to(sin.dtype)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(qkv.dtype), rest], dim=1).flatten(1)


@dataclass(frozen=True)
class Context:
    """Attention and positions of a stack's tokens."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (T, h, D / h) each -> (T, h, D / h)
    positions: Tensor  # (T,) int64, patch number of every token, -1 for CLS
    sin: Tensor  # (P, D / h), tables of `AxialRope`
    cos: Tensor
    special: Literal["keep", "zero"]  # treatment of q and k of CLS, see `rope_qk`
    # (F, M) patch numbers: the block outputs only these; keys and values still cover all tokens.
    query_ids: Tensor | None = None

    def take_queries(self, x_TD: Tensor) -> Tensor:
        """Select the tokens of `query_ids`, (T, D) -> (F * M, D); all tokens if None."""
        ids = self.query_ids
        return x_TD if ids is None else gather_tokens(x_TD.unflatten(0, (len(ids), -1)), ids).flatten(0, 1)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of products with a parameter: autocast's if it is enabled, else the parameter's."""
    device = parameter.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype


def pack(x_FLD: Tensor) -> Tensor:
    """Tokens of frames (F, L, D) -> (T, D), for a stack of blocks.

    Not by `flatten`: the first block would get a view and the others not, and be compiled twice.
    """
    return torch.ops.aten._unsafe_view(x_FLD, [x_FLD.shape[0] * x_FLD.shape[1], x_FLD.shape[2]])


class ScaledLinear(nn.Linear):
    """A linear layer whose output is multiplied by a learnt `scale` (D,): LayerScale.

    The scale is multiplied into the weight and bias, which have fewer elements than the output.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale = nn.Parameter(torch.ones(out_features))

    def used(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the product."""
        return self.weight * self.scale[:, None], self.bias * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.used())


class MaskedLinear(nn.Linear):
    """A linear layer whose bias is multiplied by a fixed `bias_mask` (D,), so that some stay 0 in training: DINOv3."""

    bias_mask: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("bias_mask", torch.ones(out_features))

    def used(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the product."""
        return self.weight, self.bias * self.bias_mask.to(self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.used())


PLAIN = {nn.Linear, ScaledLinear, MaskedLinear}
LAYERS = PLAIN | {nn.LayerNorm, nn.Conv2d}


def used(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias that a bare layer multiplies by and adds, in `compute_dtype`."""
    dtype = compute_dtype(layer.weight)
    weight, bias = layer.used() if isinstance(layer, ScaledLinear | MaskedLinear) else (layer.weight, layer.bias)
    return weight.to(dtype), bias.to(dtype)


def is_bare(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias, which kernels read: no hook, parametrization, wrapper or other forward.

    Other layers are called. Hooks that torch registers for all modules are not considered.
    """
    known = type(layer) in LAYERS or type(layer).__name__ == "Float8Linear"
    # Not `layer.bias`: `Module.__getattr__` is slow.
    return known and layer._parameters.get("bias") is not None and not is_hooked(layer)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of its forward or backward pass, or a replaced `forward`."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def is_plain(layer: nn.Linear) -> bool:
    """Whether a bare layer multiplies by its weight and adds its bias as `used`; float8 layers have other products."""
    return type(layer) in PLAIN


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Output of a layer, if it is bare in `compute_dtype`."""
    if not is_bare(layer):
        return layer(x)
    weight, bias = used(layer)
    return linear(x.to(weight.dtype), weight, bias)


def linear_detached_bias(layer: nn.Linear, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Linear output, plus the bias whose gradient `add_norm` will produce (float8 layers produce their own)."""
    weight, bias = used(layer)
    if is_plain(layer):
        return linear(x_TD, weight, bias.detach()), bias
    return layer(x_TD), bias.detach()


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions and biases."""

    def __init__(self, dim: int, num_heads: int, options: EncoderOptions = DEFAULT) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = (MaskedLinear if options.masked_bias else nn.Linear)(dim, 3 * dim)
        self.proj = (ScaledLinear if options.layer_scale else nn.Linear)(dim, dim)

    def forward(self, x_TD: Tensor, context: Context, fused: bool = True) -> tuple[Tensor, Tensor] | Tensor:
        """Normed tokens (T, D) -> update of the residual stream, (T, D) or of the queries.

        If `fused`, also the bias for `add_norm`; else the layers are called.
        """
        if not fused:
            q, k, v = self._rotate(self.qkv(x_TD), context)
            q = context.take_queries(q.flatten(1)).unflatten(1, q.shape[1:])
            return self.proj(context.attend(q, k, v).flatten(1))
        if context.query_ids is None:
            q, k, v = self._project(x_TD, context.positions, context, "qkv")
        else:
            (q,) = self._project(context.take_queries(x_TD), context.query_ids.flatten(), context, "q")
            k, v = self._project(x_TD, context.positions, context, "kv")
        return linear_detached_bias(self.proj, context.attend(q, k, v).flatten(1))

    def _project(self, x_TD: Tensor, positions: Tensor, context: Context, parts: str) -> tuple[Tensor, ...]:
        rotation = positions, context.sin, context.cos, self.num_heads
        if parts == "qkv" and not is_plain(self.qkv):
            # In place: the linear layer's backward pass does not need its output.
            return self._rotate(self.qkv(x_TD), context, inplace=True)
        # The weight's rows are q, k, v; this is a view of some.
        width = self.qkv.in_features
        rows = slice(width if parts == "kv" else 0, width if parts == "q" else None)
        weight, bias = (each[rows] for each in used(self.qkv))
        x_TD = x_TD.to(weight.dtype)
        if context.sin.itemsize < 4 <= x_TD.itemsize:  # as the released encoder without its decoder
            qkv = rotate_rounded(F.linear(x_TD, weight, bias), *rotation, parts)
            return qkv.unflatten(1, (len(parts), self.num_heads, -1)).unbind(1)
        return rotary_projection(x_TD, weight, bias, *rotation, context.special, parts)

    def _rotate(self, qkv: Tensor, context: Context, inplace: bool = False) -> tuple[Tensor, ...]:
        rotation = context.positions, context.sin, context.cos, self.num_heads
        if context.sin.itemsize < 4 <= qkv.itemsize:
            qkv = rotate_rounded(qkv, *rotation, "qkv")
        else:
            qkv = rope_qk(qkv, *rotation, context.special, inplace)
        return qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between; `recompute` as in `fastmum.kernels.mlp`."""

    recompute: Literal["none", "act", "mlp"] = "none"

    def __init__(self, dim: int, options: EncoderOptions = DEFAULT) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = (ScaledLinear if options.layer_scale else nn.Linear)(MLP_RATIO * dim, dim)

    def forward(self, x_TD: Tensor, fused: bool = True) -> tuple[Tensor, Tensor] | Tensor:
        """Normed tokens (T, D) -> update of the residual stream, (T, D); if `fused`, also the bias for `add_norm`."""
        fc1, fc2 = self.fc1, self.fc2
        if not fused:
            return fc2(F.gelu(fc1(x_TD)))
        if not (is_plain(fc1) and is_plain(fc2)):
            return linear_detached_bias(fc2, F.gelu(fc1(x_TD)))
        (weight1, bias1), (weight2, bias2) = used(fc1), used(fc2)
        return mlp(x_TD.to(weight1.dtype), weight1, bias1, weight2, bias2, self.recompute), bias2


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    The sum at the end of a block and the norm at the start of the next are one operation, so blocks take and return
    both the residual stream and its norm.
    """

    compiled_compute: Callable[..., tuple[Tensor, Tensor]] | None = None  # compiled `_compute`

    def __init__(self, dim: int, num_heads: int, norm_eps: float, options: EncoderOptions = DEFAULT) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, options)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, options)

    def forward(
        self, x_TD: Tensor, normed_TD: Tensor, context: Context, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the block to the residual stream and its `norm1`, (T, D) each.

        `weight` and `bias` (D,) are those of the norm after this block, with the epsilon of this block's. Returns the
        stream after this block and its norm, (T, D) or the tokens of `context.query_ids` only. Without weight and bias,
        or if a layer is not bare, layers are called instead of fused, and the norm is None: the caller calls it.
        """
        if weight is None or bias is None or not self.is_fused():
            return self._call_layers(x_TD, normed_TD, context), None
        # The compiled part excludes the module's hooks, where FSDP gathers weights.
        compute = self.compiled_compute or Block._compute
        return compute(self, x_TD, normed_TD, context, weight, bias)

    def is_fused(self) -> bool:
        """Whether all layers are bare."""
        layers = self._modules
        attn, mlp = layers["attn"], layers["mlp"]
        if type(attn) is not Attention or type(mlp) is not Mlp or is_hooked(attn) or is_hooked(mlp):
            return False
        within = layers["norm2"], *attn._modules.values(), *mlp._modules.values()
        return all(layer is not None and is_bare(layer) for layer in within)

    def _compute(
        self, x_TD: Tensor, normed_TD: Tensor, context: Context, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        eps = self.norm2.eps
        x_TD = context.take_queries(x_TD)
        x_TD, normed_TD = add_norm(x_TD, *self.attn(normed_TD, context), self.norm2.weight, self.norm2.bias, eps)
        return add_norm(x_TD, *self.mlp(normed_TD), weight, bias, eps)

    def _call_layers(self, x_TD: Tensor, normed_TD: Tensor, context: Context) -> Tensor:
        """The stream after this block; hooks, parametrizations and wrappers of layers take effect."""
        x_TD = context.take_queries(x_TD)
        x_TD = (x_TD + self.attn(normed_TD, context, fused=False)).to(x_TD.dtype)
        normed_TD = self.norm2(x_TD).to(compute_dtype(x_TD))
        return (x_TD + self.mlp(normed_TD, fused=False)).to(x_TD.dtype)

"""The model: encoder, decoder of two views, and head of poses.

Both views of all pairs are packed: frames 2 i and 2 i + 1 are a pair. One set of weights serves both views.

Legend: F = 2 B frames of B pairs, P patches of a frame, T = F * P tokens, E width of the encoder, D of the decoder, h
heads, C width of the head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmum.attention import dense_attention
from fastmum.kernels import add_norm, rotary_projection
from fastmum.model.block import (
    Attention,
    AxialRope,
    Context,
    Mlp,
    apply_linear,
    compute_dtype,
    linear_detached_bias,
    used,
)
from fastmum.model.config import BACKWARD, MLP_RATIO, ModelConfig, encoding_flops
from fastmum.model.encoder import RECOMPUTE, Encoder
from fastmum.tasks.pose.rotation import nearest_rotation

NORM_EPS = 1e-6  # of the decoder's norms (croco)
RESIDUAL_BLOCKS, CONVOLUTIONS = 2, 3  # of the head (Reloc3r)
HALF = (0.5, 0.5, 0.5)  # mean and standard deviation of the normalisation of images, whatever the encoder (Reloc3r)


@dataclass(frozen=True)
class PoseConfig:
    """Sizes; a ValueError names an invalid one. Defaults are those of the MuM paper (supplement B)."""

    encoder_dim: int = 1024
    patch_size: int = 16
    embed_dim: int = 768  # of the decoder
    depth: int = 12
    num_heads: int = 12
    head_dim: int = 1024  # width of the head; Reloc3r's is 4 * patch_size**2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        if self.embed_dim % (4 * self.num_heads):
            raise ValueError(
                f"embed_dim is {self.embed_dim}, but must be a multiple of 4 * num_heads: a sine and a cosine for each "
                "axis"
            )


class Poses(NamedTuple):
    """Pose of every frame in the other frame of its pair: x_other = R x + t, up to the scale of t."""

    R: Tensor  # (F, 3, 3)
    t: Tensor  # (F, 3)


def of_other_view(x: Tensor, rows: int) -> Tensor:
    """Exchange the views of every pair; each has `rows` rows of `x` (2 B * rows, ...)."""
    return x.unflatten(0, (-1, 2, rows)).flip(1).flatten(0, 2)


class CrossAttention(nn.Module):
    """Attention of a view's tokens to those of the other view, with rotary positions of both."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x_TD: Tensor, other_TD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Normed tokens, and those of the other views -> update of the stream (T, D), and its bias for `add_norm`."""
        rotation = context.positions, context.sin, context.cos, self.num_heads, "keep"
        (weight_q, bias_q), (weight_kv, bias_kv) = used(self.q), used(self.kv)
        (q,) = rotary_projection(x_TD.to(weight_q.dtype), weight_q, bias_q, *rotation, "q")
        k, v = rotary_projection(other_TD.to(weight_q.dtype), weight_kv, bias_kv, *rotation, "kv")
        return linear_detached_bias(self.proj, context.attend(q, k, v).flatten(1))


class Block(nn.Module):
    """x + attention(norm1(x)), + cross-attention(norm2(x), norm_y(other view)), + mlp(norm3(x)) (croco's decoder).

    Both views attend to what the other one was before this block. As in the encoder, each sum and the norm after it are
    one operation, so blocks take and return both the stream and its `norm1`.
    """

    compiled_compute: Callable[..., tuple[Tensor, Tensor]] | None = None  # compiled `_compute`

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_y = (nn.LayerNorm(dim, eps=NORM_EPS) for _ in range(4))
        self.attn, self.cross_attn, self.mlp = Attention(dim, num_heads), CrossAttention(dim, num_heads), Mlp(dim)

    def forward(
        self, x_TD: Tensor, normed_TD: Tensor, context: Context, patches: int, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply the block; `patches` of a frame, `weight` and `bias` (D,) of the norm after it."""
        # The compiled part excludes the module's hooks, where FSDP gathers weights.
        return (self.compiled_compute or Block._compute)(self, x_TD, normed_TD, context, patches, weight, bias)

    def _compute(
        self, x_TD: Tensor, normed_TD: Tensor, context: Context, patches: int, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        other_TD = self.norm_y(of_other_view(x_TD, patches)).to(normed_TD.dtype)
        x_TD, normed_TD = add_norm(x_TD, *self.attn(normed_TD, context), self.norm2.weight, self.norm2.bias, NORM_EPS)
        update = self.cross_attn(normed_TD, other_TD, context)
        x_TD, normed_TD = add_norm(x_TD, *update, self.norm3.weight, self.norm3.bias, NORM_EPS)
        return add_norm(x_TD, *self.mlp(normed_TD), weight, bias, NORM_EPS)


class Decoder(nn.Module):
    """Tokens of the encoder -> tokens that know the other view, normed."""

    recompute = "none"

    def __init__(self, config: PoseConfig) -> None:
        super().__init__()
        dim, heads = config.embed_dim, config.num_heads
        self.embed = nn.Linear(config.encoder_dim, dim)
        self.rope = AxialRope(dim // heads, "whole")
        self.rope.init_weights()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, tokens_FPE: Tensor, grid: tuple[int, int]) -> Tensor:
        """(F, P, E) -> (F, P, D)."""
        frames, patches, _ = tokens_FPE.shape
        x_TD = apply_linear(self.embed, tokens_FPE).to(self.norm.weight.dtype).flatten(0, 1)
        sin, cos = self.rope.tables(*grid)
        positions = torch.arange(patches, device=x_TD.device).repeat(frames)
        context = Context(partial(dense_attention, seqlen=patches), positions, sin, cos, special="keep")
        blocks = cast(Sequence[Block], self.blocks)
        norms = [*(block.norm1 for block in blocks), self.norm]
        normed_TD = norms[0](x_TD).to(compute_dtype(x_TD))
        for block, norm in zip(blocks, norms[1:], strict=True):
            args = x_TD, normed_TD, context, patches, norm.weight, norm.bias
            if self.recompute == "blocks" and torch.is_grad_enabled():
                x_TD, normed_TD = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD, normed_TD = block(*args)
        return normed_TD.unflatten(0, (frames, patches))


class PoseHead(nn.Module):
    """The mean over the patches of a residual network, two layers, then translation and rotation; in float32.

    The public code's 1x1 convolutions of the map of patches are linear layers here.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, width)
        self.residual = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, width) for _ in range(CONVOLUTIONS)) for _ in range(RESIDUAL_BLOCKS)
        )
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.translation, self.rotation = nn.Linear(width, 3), nn.Linear(width, 9)

    def forward(self, tokens_FPD: Tensor) -> tuple[Tensor, Tensor]:
        """(F, P, D) -> translations (F, 3) and matrices (F, 9), whose nearest rotation is the pose's."""
        with torch.autocast(tokens_FPD.device.type, enabled=False):
            x = self.proj(tokens_FPD.to(self.proj.weight.dtype))
            for layers in self.residual:
                y = x
                for layer in cast(Sequence[nn.Linear], layers):
                    y = F.relu(layer(y))
                x = x + y
            x = F.relu(self.fc2(F.relu(self.fc1(x.mean(1)))))
            return self.translation(x), self.rotation(x)


class RelativePose(nn.Module):
    """Pairs of images -> poses of each view in the other. Without an encoder `predict` takes its tokens."""

    def __init__(self, config: PoseConfig, encoder: Encoder | None = None, half: bool = True) -> None:
        super().__init__()
        self.config = config
        if encoder is not None and half:
            encoder.options = replace(encoder.options, mean=HALF, std=HALF)
            encoder.about = {**encoder.about, "mean": [*HALF], "std": [*HALF]}
        self.encoder, self.decoder = encoder, Decoder(config)
        self.head = PoseHead(config.embed_dim, config.head_dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Reloc3r's: Xavier uniform and zero biases, but its 1x1 convolutions keep PyTorch's default."""
        convolutions = {*self.head.residual.modules()}
        pairs = {block.cross_attn.kv for block in cast(Sequence[Block], self.decoder.blocks)}  # two public layers each
        for module in (*self.decoder.modules(), *self.head.modules()):
            if isinstance(module, nn.Linear) and module not in convolutions:
                nn.init.zeros_(module.bias)
                for part in module.weight.chunk(2 if module in pairs else 1):
                    nn.init.xavier_uniform_(part)

    def set_recompute(self, what: str) -> None:
        """Set what the backward pass recomputes, in encoder and decoder, as in `Encoder.set_recompute`."""
        if what not in RECOMPUTE:
            raise ValueError(f"recompute is '{what}', but must be one of {', '.join(RECOMPUTE)}")
        if self.encoder is not None:
            self.encoder.set_recompute(what)
        self.decoder.recompute = what
        for block in cast(Sequence[Block], self.decoder.blocks):
            block.mlp.recompute = "act" if what == "mlp" else "none"

    def forward(self, images: Tensor) -> Poses:
        """Predict from frames of one size, two for each pair; images as in `Encoder.tokens`."""
        assert self.encoder is not None
        (tokens,) = self.encoder.tokens(images, norm=True)
        return self.predict(tokens.patch, tokens.grid)

    def predict(self, tokens_FPE: Tensor, grid: tuple[int, int]) -> Poses:
        """Predict from the encoder's patch tokens (F, P, E)."""
        t, rows = self.head(self.decoder(tokens_FPE, grid))
        return Poses(nearest_rotation(F.normalize(rows.unflatten(1, (3, 3)), dim=2)), t)


def frame_flops(config: PoseConfig, grid: tuple[int, int], encoder: ModelConfig, prefix: int, finetune: bool) -> float:
    """Operations of one frame in a training step, forward and backward, without recomputation; two per multiply-add.

    `prefix` is the number of the encoder's tokens besides those of patches.
    """
    P, D, E, C = grid[0] * grid[1], config.embed_dim, encoder.embed_dim, config.head_dim
    # Self-attention and cross-attention have four matrices of width D each.
    decoder = config.depth * (2 * P * (8 + 2 * MLP_RATIO) * D * D + 2 * 4 * P * P * D) + 2 * P * E * D
    head = 2 * P * (D * C + RESIDUAL_BLOCKS * CONVOLUTIONS * C * C) + 2 * (2 * C * C + 12 * C)
    return BACKWARD * (decoder + head) + (BACKWARD if finetune else 1) * encoding_flops(encoder, P, prefix + P)

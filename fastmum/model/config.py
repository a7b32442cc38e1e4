"""Sizes of the model, presets (paper, supplement, section A "Architecture"), and operations of a training step."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

COMPILE_MODES = ("auto", "block", "full", "off")
# Bounds of sizes, which a damaged file may state, before a model is built.
LARGEST = {
    "embed_dim": 1 << 16, "depth": 1000, "num_heads": 1 << 12, "decoder_embed_dim": 1 << 16, "decoder_depth": 1000,
    "decoder_num_heads": 1 << 12, "patch_size": 1 << 10, "in_chans": 1 << 10,
}  # fmt: skip
MLP_RATIO = 4  # hidden width of every MLP over its block's width


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of encoder and decoder; a ValueError names an invalid one with its value and what is allowed."""

    embed_dim: int  # width of the encoder
    depth: int  # its blocks
    num_heads: int
    decoder_embed_dim: int
    decoder_depth: int  # frame and global blocks together
    decoder_num_heads: int
    patch_size: int = 16  # side of a square patch in pixels
    in_chans: int = 3  # channels of a frame
    norm_eps: float = 1e-5  # of every LayerNorm; value of the released training configuration

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "norm_eps":
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                    raise ValueError(f"norm_eps is {value!r}, but must be a number between 0 and 1")
            elif type(value) is not int or not 1 <= value <= LARGEST[field.name]:
                raise ValueError(f"{field.name} is {value!r}, but must be an integer from 1 to {LARGEST[field.name]}")
        for width, heads in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
            D, h = getattr(self, width), getattr(self, heads)
            if D % (4 * h):
                reason = "must be a multiple of 4: a sine and a cosine for each image axis"
                raise ValueError(f"{width} is {D} with {heads} {h}, but a head's width ({width} / {heads}) {reason}")
        if self.decoder_depth % 2:
            raise ValueError(f"decoder_depth is {self.decoder_depth}, but must be even: half of the blocks are global")


PRESETS: dict[str, ModelConfig] = {
    "mum_vitl16": ModelConfig(1024, 24, 16, 768, 12, 12),
    # The released weights were trained with 16 decoder heads, which the shapes in the file do not show.
    "mum_vitl16_released": ModelConfig(1024, 24, 16, 768, 12, 16),
    "mum_vitb16": ModelConfig(768, 12, 12, 512, 8, 16),
    "mum_tiny": ModelConfig(192, 6, 3, 128, 4, 4),
}


class Flops(NamedTuple):
    """Operations of the forward and backward passes, without recomputation: of linear layers and of attention."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


BACKWARD = 3  # operations of a pass forward and backward, over those of the forward pass


def block_flops(width: int) -> int:
    """Operations of a block's linear layers for a token: four matrices of width x width, the MLP's of MLP_RATIO."""
    return 2 * (4 + 2 * MLP_RATIO) * width * width


def encoding_flops(config: ModelConfig, patches: int, tokens: int) -> int:
    """Operations of the encoder's forward pass for a frame; `tokens` are `patches` and the prefix."""
    D = config.embed_dim
    blocks = config.depth * tokens * (block_flops(D) + 4 * tokens * D)
    return blocks + patches * 2 * config.in_chans * config.patch_size**2 * D


def step_flops(config: ModelConfig, num_patches: int, visible: int, lengths: Sequence[int]) -> Flops:
    """Operations of a step on sequences of `lengths` frames, two per multiply-add of a matrix product.

    Legend: F frames, P patches of a frame, K visible, M masked, D encoder width, E decoder width, S frames of one.
    """
    F, P, K, M = sum(lengths), num_patches, visible, num_patches - visible
    D, E, pixels = config.embed_dim, config.decoder_embed_dim, config.in_chans * config.patch_size**2
    pairs = config.decoder_depth // 2
    squares = sum(S * S for S in lengths)

    encoder = config.depth * F * (1 + K) * block_flops(D)
    frame_blocks = pairs * F * (1 + P) * block_flops(E)
    global_blocks = (pairs - 1) * F * (1 + P) * block_flops(E)
    last_block = F * (1 + P) * 4 * E * E + F * M * (block_flops(E) - 4 * E * E)  # keys and values of all tokens
    ends = F * (1 + K) * 2 * D * E + F * M * 2 * E * pixels
    # Forward, and for the gradients of inputs and of weights; pixels need no gradient.
    linear = 3 * (encoder + frame_blocks + global_blocks + last_block + ends) + 2 * F * K * 2 * pixels * D

    # Lq * Lk * width of all segments. Scores and weighted values take 2 of each, and twice that in the backward pass.
    pairs_of_tokens = config.depth * F * (1 + K) ** 2 * D + pairs * F * (1 + P) ** 2 * E
    pairs_of_tokens += (pairs - 1) * squares * (1 + P) ** 2 * E + squares * M * (1 + P) * E
    return Flops(linear, attention=3 * 4 * pairs_of_tokens)

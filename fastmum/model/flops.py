"""Operations of a training step from the model's sizes: two per multiply-add of a matrix product.

Legend: F frames, P patches of a frame, K visible, M masked, D encoder width, E decoder width, S frames of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastmum.model.config import MLP_RATIO, ModelConfig


class Flops(NamedTuple):
    """Operations of the forward and backward passes, without recomputation: of linear layers and of attention."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


def step_flops(config: ModelConfig, num_patches: int, visible: int, lengths: Sequence[int]) -> Flops:
    """Operations of a step with K of P patches visible, on sequences of `lengths` frames."""
    F, P, K, M = sum(lengths), num_patches, visible, num_patches - visible
    D, E, pixels = config.embed_dim, config.decoder_embed_dim, config.in_chans * config.patch_size**2
    pairs = config.decoder_depth // 2
    squares = sum(S * S for S in lengths)

    # A block: q, k, v and the projection are 4 matrices of width x width, the MLP 2 of MLP_RATIO times that.
    encoder = config.depth * F * (1 + K) * _block(D)
    frame_blocks = pairs * F * (1 + P) * _block(E)
    global_blocks = (pairs - 1) * F * (1 + P) * _block(E)
    last_block = F * (1 + P) * 4 * E * E + F * M * (_block(E) - 4 * E * E)  # keys and values of all tokens
    ends = F * (1 + K) * 2 * D * E + F * M * 2 * E * pixels
    # Forward, and for the gradients of inputs and of weights; pixels need no gradient.
    linear = 3 * (encoder + frame_blocks + global_blocks + last_block + ends) + 2 * F * K * 2 * pixels * D

    # Lq * Lk * width of all segments. Scores and weighted values take 2 of each, and twice that in the backward pass.
    pairs_of_tokens = (
        config.depth * F * (1 + K) ** 2 * D
        + pairs * F * (1 + P) ** 2 * E
        + (pairs - 1) * squares * (1 + P) ** 2 * E
        + squares * M * (1 + P) * E
    )
    return Flops(linear, attention=3 * 4 * pairs_of_tokens)


def _block(width: int) -> int:
    return 2 * (4 + 2 * MLP_RATIO) * width * width

"""Operations of a training step, forward and backward, without recomputation; two per multiply-add."""

from fastmum.model.config import BACKWARD, MLP_RATIO, ModelConfig, encoding_flops
from fastmum.tasks.pose.model import CONVOLUTIONS, RESIDUAL_BLOCKS, PoseConfig


def frame_flops(config: PoseConfig, grid: tuple[int, int], encoder: ModelConfig, prefix: int, finetune: bool) -> float:
    """Operations of one frame; `prefix` is the number of the encoder's tokens besides those of patches."""
    P, D, E, C = grid[0] * grid[1], config.embed_dim, encoder.embed_dim, config.head_dim
    # Self-attention and cross-attention have four matrices of width D each.
    decoder = config.depth * (2 * P * (8 + 2 * MLP_RATIO) * D * D + 2 * 4 * P * P * D) + 2 * P * E * D
    head = 2 * P * (D * C + RESIDUAL_BLOCKS * CONVOLUTIONS * C * C) + 2 * (2 * C * C + 12 * C)
    return BACKWARD * (decoder + head) + (BACKWARD if finetune else 1) * encoding_flops(encoder, P, prefix + P)

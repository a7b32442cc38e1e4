"""Operations of a training step, forward and backward, without recomputation; two per multiply-add.

Legend: F frames, S frames of a sequence, L tokens of a frame, C width of the aggregator.
"""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmum.model.config import BACKWARD, ModelConfig, block_flops, encoding_flops
from fastmum.tasks.reconstruction.aggregator import Tap
from fastmum.tasks.reconstruction.camera import NUMBERS
from fastmum.tasks.reconstruction.dpt import LEVELS, Dpt
from fastmum.tasks.reconstruction.model import ReconstructionConfig


def frame_flops(config: ReconstructionConfig, grid: tuple[int, int], encoder: ModelConfig, finetune: bool) -> float:
    """Operations of one frame, but for attention across frames."""
    P, C = grid[0] * grid[1], config.embed_dim
    L = 1 + config.registers + P
    blocks = 2 * config.pairs * L * block_flops(C) + config.pairs * 4 * L * L * C
    projection = 2 * P * config.encoder_dim * C if config.encoder_dim != C else 0
    ends = 2 * NUMBERS * 2 * C + 2 * 2 * C * 6 * C + 2 * 2 * C * C + 2 * C * NUMBERS
    camera = config.camera_iterations * (config.camera_blocks * block_flops(2 * C) + ends)
    encoding = encoding_flops(encoder, P, 1 + P)
    heads = sum(dense_flops(config, grid, outputs) for outputs in ((1, 3) if config.points else (1,)))
    return BACKWARD * (blocks + projection + camera + heads) + (BACKWARD if finetune else 1) * encoding


def square_flops(config: ReconstructionConfig, grid: tuple[int, int], lengths: Sequence[int]) -> float:
    """Operations of attention across the frames of sequences."""
    L = 1 + config.registers + grid[0] * grid[1]
    return BACKWARD * config.pairs * 4 * L * L * config.embed_dim * sum(S * S for S in lengths)


def dense_flops(config: ReconstructionConfig, grid: tuple[int, int], outputs: int) -> int:
    """Operations of a dense head's forward pass for one frame, counted on tensors without data."""
    with torch.device("meta"), torch.no_grad():
        head = Dpt(2 * config.embed_dim, outputs, "exp", config.dpt_features, config.dpt_levels)
        tokens = torch.empty(1, grid[0] * grid[1], config.embed_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head.maps([Tap(tokens, tokens)] * LEVELS, slice(None), grid, config.patch_size)
    return counter.get_total_flops()

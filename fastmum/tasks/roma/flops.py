"""Operations of a training step, forward and backward; two per multiply-add. Local correlation is not counted."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastmum.model.config import MLP_RATIO, ModelConfig
from fastmum.tasks.roma.decoder import COARSE, Decoder
from fastmum.tasks.roma.model import RomaConfig
from fastmum.tasks.roma.vgg import Vgg

BACKWARD = 3  # operations with those of the backward pass, over those of the forward pass


def pair_flops(config: RomaConfig, encoder: ModelConfig, side: int) -> float:
    """Operations of a pair of square images, counted on tensors without data; the encoder's by formula."""
    grid = side // config.patch_size
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        cnn = Vgg(config.vgg, config.vgg_layers).eval()
        decoder = Decoder(
            config.scales, config.gp_dim, config.num_heads, config.blocks, config.anchors, config.hidden_blocks
        ).eval()
        maps = cnn(torch.empty(1, 3, side, side)) | {COARSE: torch.empty(1, config.encoder_dim, grid, grid)}
        counted = counter.get_total_flops()  # the fine encoder's of one image
        decoder(maps, maps)
    P, E = grid * grid, encoder.embed_dim
    encoding = encoder.depth * (2 * P * (4 + 2 * MLP_RATIO) * E * E + 4 * P * P * E)
    encoding += 2 * P * encoder.in_chans * encoder.patch_size**2 * E
    return BACKWARD * (counter.get_total_flops() + counted) + 2 * encoding

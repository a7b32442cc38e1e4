"""Operations of a training step, forward and backward; two per multiply-add. Local correlation is not counted."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastmum.model.config import BACKWARD, ModelConfig, encoding_flops
from fastmum.tasks.roma.decoder import COARSE
from fastmum.tasks.roma.model import RomaConfig
from fastmum.tasks.roma.vgg import Vgg


def pair_flops(config: RomaConfig, encoder: ModelConfig, side: int) -> float:
    """Operations of a pair of square images, counted on tensors without data; the encoder's by formula."""
    grid = side // config.patch_size
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        cnn = Vgg(config.vgg, config.vgg_layers).eval()
        maps = cnn(torch.empty(1, 3, side, side)) | {COARSE: torch.empty(1, config.encoder_dim, grid, grid)}
        counted = counter.get_total_flops()  # the fine encoder's of one image
        config.decoder().eval()(maps, maps)
    return BACKWARD * (counter.get_total_flops() + counted) + 2 * encoding_flops(encoder, grid * grid, grid * grid)

"""The model: frozen encoder, fine encoder and decoder. Names of weights are RoMa's, but for the encoder's."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastmum.model.config import BACKWARD, ModelConfig, encoding_flops
from fastmum.model.encoder import Encoder
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastmum.model.options import normalise
from fastmum.tasks.roma.decoder import COARSE, STRIDES, Decoder, Scale, ScaleOutput
from fastmum.tasks.roma.vgg import LAYERS, Vgg


@dataclass(frozen=True)
class RomaConfig:
    """Sizes; a ValueError names an invalid one. Defaults are RoMa's; tuples are of strides 16, 8, 4, 2, 1."""

    encoder_dim: int = 1024  # width of the encoder's tokens
    patch_size: int = 16
    vgg: tuple[int, ...] = (64, 128, 256, 512)  # channels of strides 1, 2, 4, 8
    vgg_layers: tuple[int, ...] = LAYERS
    projected: tuple[int, ...] = (512, 512, 256, 64, 9)
    displacement: tuple[int, ...] = (128, 64, 32, 16, 6)
    radius: tuple[int, ...] = (7, 3, 2, 0, 0)  # of the local correlation; 0: none
    gp_dim: int = 512
    num_heads: int = 8
    blocks: int = 5  # of the coarse transformer
    anchors: int = 64  # side of their grid
    hidden_blocks: int = 8  # of a refiner

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else [value]
            if any(number < (0 if name in ("radius", "blocks", "hidden_blocks") else 1) for number in numbers):
                raise ValueError(f"{name} is {value}, but is too small")
            if isinstance(value, tuple) and len(value) != (4 if name.startswith("vgg") else len(STRIDES)):
                raise ValueError(f"{name} is {list(value)}, but must have a number for each stride")
        if (self.gp_dim + self.projected[0]) % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}, but must divide gp_dim + projected[0]")

    @property
    def scales(self) -> dict[int, Scale]:
        """Sizes of the refiners by stride."""
        columns = (self.encoder_dim, *self.vgg[::-1]), self.projected, self.displacement, self.radius
        return {stride: Scale(*sizes) for stride, *sizes in zip(STRIDES, *columns, strict=True)}

    def decoder(self) -> Decoder:
        """A new decoder."""
        return Decoder(self.scales, self.gp_dim, self.num_heads, self.blocks, self.anchors, self.hidden_blocks)


class Roma(nn.Module):
    """Pairs of images -> warps and certainties by stride.

    Args:
        encoder: frozen; its normed patch tokens are matched at the coarsest stride.
    """

    def __init__(self, config: RomaConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.cnn = Vgg(config.vgg, config.vgg_layers)
        self.decoder = config.decoder()

    def train(self, mode: bool = True) -> "Roma":
        """Set the mode of all but the encoder, which stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> dict[int, ScaleOutput]:
        """Outputs by stride, from the first to the second images of pairs.

        `images` (2 B, H, W, 3) uint8 are the first ones of all pairs, then the second ones; H and W are multiples of
        the patch size and of 8.
        """
        return self.decoder(*sides(self.maps(images)))

    def maps(self, images: Tensor, coarse: bool = True) -> dict[int, Tensor]:
        """Maps (N, C, h, w) by stride of images (N, H, W, 3) uint8; `coarse`: with those of the encoder."""
        maps = self.cnn(normalise(images.permute(0, 3, 1, 2).float() / 255, IMAGENET_MEAN, IMAGENET_STD))
        if coarse:
            with torch.no_grad():
                (tokens,) = self.encoder.tokens(images, norm=True)
            maps[COARSE] = tokens.maps()
        return maps


def sides(maps: Mapping[int, Tensor], both: bool = False) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Maps of the first and of the second images; with `both` in either order, one after the other."""
    halves = {stride: x.chunk(2) for stride, x in maps.items()}
    if both:
        return dict(maps), {stride: torch.cat([b, a]) for stride, (a, b) in halves.items()}
    return {stride: a for stride, (a, _) in halves.items()}, {stride: b for stride, (_, b) in halves.items()}


def pair_flops(config: RomaConfig, encoder: ModelConfig, side: int) -> float:
    """Operations of a pair of square images in a training step, forward and backward; two per multiply-add.

    Counted on tensors without data, the encoder's by formula. Local correlation is not counted.
    """
    grid = side // config.patch_size
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        cnn = Vgg(config.vgg, config.vgg_layers).eval()
        maps = cnn(torch.empty(1, 3, side, side)) | {COARSE: torch.empty(1, config.encoder_dim, grid, grid)}
        counted = counter.get_total_flops()  # the fine encoder's of one image
        config.decoder().eval()(maps, maps)
    return BACKWARD * (counter.get_total_flops() + counted) + 2 * encoding_flops(encoder, grid * grid, grid * grid)

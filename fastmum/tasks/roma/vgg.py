"""The fine encoder: VGG19 with batch norm up to its fourth pooling."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from fastmum.pretrained.files import read_file
from fastmum.pretrained.layout import WeightsError

LAYERS = (2, 2, 4, 4)  # convolutions of VGG19 before each pooling


class Vgg(nn.Module):
    """Images -> maps of strides 1, 2, 4 and 8, each taken before a pooling. Names of weights are torchvision's.

    Args:
        channels: of the maps.
        layers: 3x3 convolutions of each stride, with batch norm and ReLU.
    """

    def __init__(self, channels: Sequence[int] = (64, 128, 256, 512), layers: Sequence[int] = LAYERS) -> None:
        super().__init__()
        self.layers, width = nn.ModuleList(), 3
        for stage, (out, count) in enumerate(zip(channels, layers, strict=True)):
            if stage:
                self.layers.append(nn.MaxPool2d(2, 2))
            for _ in range(count):
                self.layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                width = out
        for module in self.modules():  # as in torchvision
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Maps by stride of normalised images (B, 3, H, W)."""
        maps, stride, x = dict[int, Tensor](), 1, images
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                maps[stride], stride = x, 2 * stride
            x = layer(x)
        return maps | {stride: x}

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load a file of torchvision's `vgg19_bn`, of which the last layers are not used.

        WeightsError: it cannot be read, or has other names or shapes.
        """
        tree = read_file(Path(path)).tree
        names = ((re.fullmatch(r"features\.(\d+)\.(.+)", str(name)), x) for name, x in tree.items())
        found = {f"layers.{m[1]}.{m[2]}": x for m, x in names if m and int(m[1]) < len(self.layers)}
        try:
            self.load_state_dict(found)
        except RuntimeError as error:
            what = " ".join(str(error).split())[:300]
            raise WeightsError(f"'{path}' is no vgg19_bn of torchvision with the sizes of this model: {what}") from None

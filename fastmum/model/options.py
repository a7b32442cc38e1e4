"""What an encoder computes besides its sizes: MuM's by default, else that of MAE, CroCo v2 or DINOv3.

Legend: P patches of a frame, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD

Coordinates = Literal["centre", "whole", "none"]
Table = Literal["bicubic", "antialias", "sincos"]
TABLES: tuple[Table, ...] = get_args(Table)


@dataclass(frozen=True)
class EncoderOptions:
    """Prefix tokens, positions, layers and images of an encoder."""

    cls: bool = True  # a CLS token, the first one
    registers: int = 0  # tokens after CLS
    # Of rotary positions: of patch centres in [-1, 1] (`AxialRope`); row and column from 0; or none.
    coordinates: Coordinates = "centre"
    table: tuple[int, int] | None = None  # rows and columns of the learnt table of positions that is added to tokens
    resize: Table = "bicubic"  # how the table is fitted to images of other sizes, see `position_table`
    layer_scale: bool = False  # `proj` and `fc2` are `ScaledLinear`
    masked_bias: bool = False  # `qkv` is a `MaskedLinear`
    # In train mode each block multiplies coordinates by its own factor, log-uniform in [1 / r, r]; DINOv3's code: 2.
    rope_rescale: float | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN  # of pixel values in 0..1, RGB
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.cls + self.registers


DEFAULT = EncoderOptions()


def position_table(stored: Tensor, trained: tuple[int, int], grid: tuple[int, int], resize: Table) -> Tensor:
    """A learnt table (1, 1 + rows * columns, D), CLS first, for a grid of other rows and columns, (1, 1 + P, D).

    "bicubic" interpolates as MAE's finetuning and transformers do, "antialias" as timm's `dynamic_img_size` does, both
    from the stored table by size, CLS row unchanged. "sincos" computes MAE's initial table for the grid instead of
    reading the stored one, as probe3d's evaluations do.
    """
    if resize == "sincos":
        return sincos_table(*grid, stored.shape[2]).to(stored)
    if grid == trained:
        return stored
    maps = stored[:, 1:].mT.unflatten(2, trained).float()
    maps = F.interpolate(maps, grid, mode="bicubic", align_corners=False, antialias=resize == "antialias")
    return torch.cat([stored[:, :1], maps.flatten(2).mT.to(stored.dtype)], dim=1)


def sincos_table(rows: int, columns: int, width: int) -> Tensor:
    """MAE's initial table (1, 1 + P, D) float32: zeros for CLS; of whole positions, the column before the row.

    Each takes half of the width: sines, then cosines, with frequencies 10000**(-k / (D / 4)), k < D / 4.
    """
    exponent = torch.arange(width // 4, dtype=torch.float64) / (width / 4)
    halves = []
    for axis in torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy"):
        angles = axis.flatten()[:, None] * 10_000.0**-exponent
        halves += [angles.sin(), angles.cos()]
    return F.pad(torch.cat(halves, dim=1).float(), (0, 0, 1, 0))[None]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (F, 3, H, W) in 0..1 as an encoder expects them."""
    mean_3, std_3 = (torch.tensor(values, device=images.device, dtype=images.dtype) for values in (mean, std))
    return (images - mean_3[:, None, None]) / std_3[:, None, None]

"""Dense heads: a map for each frame from the patch tokens of four pairs of blocks (DPT, as in VGGT), in float32.

Legend: F frames, L tokens of a frame, C width of the aggregator, (h, w) patches, (H, W) pixels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmum.tasks.reconstruction.aggregator import Tap

LEVELS = 4
HIDDEN = 32  # channels before the last layer
UV_SCALE = 0.1
UV_BASE = 100.0


class ResidualUnit(nn.Module):
    """relu(x) + two convolutions of it. VGGT's first ReLU is in place, so that the sum adds relu(x), not x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x + self.conv2(F.relu(self.conv1(x)))


class Fusion(nn.Module):
    """Adds a level to the coarser ones, and enlarges the sum."""

    def __init__(self, channels: int, has_skip: bool) -> None:
        super().__init__()
        if has_skip:
            self.resConfUnit1 = ResidualUnit(channels)
        self.resConfUnit2 = ResidualUnit(channels)
        self.out_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        # VGGT's order is enlarge, then 1x1 convolution. They commute: the weights of the interpolation sum to 1.
        return enlarge(self.out_conv(self.resConfUnit2(x)), size)


class Dpt(nn.Module):
    """`outputs` channels and a confidence for every pixel.

    Args:
        dim: width of the tokens, 2C.
        outputs: 1 for depth, 3 for points.
        activation: "exp", or "inv_log": sign(z) (exp(|z|) - 1).
        features: channels of the fusion.
        levels: channels of the four levels, from 4 times the patch grid to half of it.
    """

    chunk = 8  # frames that are computed at once (VGGT)
    recompute = False  # whether the backward pass recomputes every chunk

    def __init__(
        self, dim: int, outputs: int, activation: Literal["exp", "inv_log"], features: int, levels: Sequence[int]
    ) -> None:
        super().__init__()
        self.activation = activation
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, channels, 1) for channels in levels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(levels[0], levels[0], 4, stride=4),
                nn.ConvTranspose2d(levels[1], levels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(levels[3], levels[3], 3, stride=2, padding=1),
            ]
        )
        self.scratch = nn.Module()
        for i, channels in enumerate(levels, 1):
            self.scratch.add_module(f"layer{i}_rn", nn.Conv2d(channels, features, 3, padding=1, bias=False))
        for i in range(1, LEVELS + 1):
            self.scratch.add_module(f"refinenet{i}", Fusion(features, has_skip=i < LEVELS))
        self.scratch.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        layers = nn.Conv2d(features // 2, HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(HIDDEN, outputs + 1, 1)
        self.scratch.output_conv2 = nn.Sequential(*layers)

    def forward(
        self, taps: Sequence[Tap], grid: tuple[int, int], patch_size: int, frames: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Values (F, H, W, outputs), or (F, H, W) of one output, and confidences (F, H, W), above 1, of some frames.

        The patches are the last h * w tokens of the taps, four of them.
        """
        numbers = range(len(taps[0].within))[frames]
        parts = [numbers[i : i + self.chunk] for i in range(0, len(numbers), self.chunk)]
        maps = []
        # Autocast off: `cat` under it would already round.
        with torch.autocast(taps[0].within.device.type, enabled=False):
            for part in parts:
                args = taps, slice(part.start, part.stop, part.step), grid, patch_size
                if self.recompute and torch.is_grad_enabled():
                    maps.append(checkpoint(self.maps, *args, use_reentrant=False, preserve_rng_state=False))
                else:
                    maps.append(self.maps(*args))
            values, z = torch.cat(maps).permute(0, 2, 3, 1).tensor_split([-1], dim=-1)
            values = values.squeeze(-1) if values.shape[-1] == 1 else values
            values = values.exp() if self.activation == "exp" else values.sign() * values.abs().expm1()
            return values, 1 + z[..., 0].exp()

    def maps(self, taps: Sequence[Tap], frames: slice, grid: tuple[int, int], patch_size: int) -> Tensor:
        """Before the activation, (F', outputs + 1, H, W)."""
        patches, height, width = slice(-grid[0] * grid[1], None), grid[0] * patch_size, grid[1] * patch_size
        aspect, skips = width / height, []
        layers = cast(Mapping[str, nn.Module], self.scratch._modules)
        for i, tap in enumerate(taps):
            tokens = self.norm(tap.select(frames, patches).to(self.norm.weight.dtype))
            x = self.projects[i](tokens.unflatten(1, grid).permute(0, 3, 1, 2))  # channels last in memory
            x = self.resize_layers[i](x + UV_SCALE * uv_embedding(x, aspect))
            skips.append(layers[f"layer{i + 1}_rn"](x))
        sizes = [(2 * skips[0].shape[2], 2 * skips[0].shape[3]), *((x.shape[2], x.shape[3]) for x in skips)]
        x = layers["refinenet4"](skips[3], None, sizes[3])
        for i in (3, 2, 1):
            x = layers[f"refinenet{i}"](x, skips[i - 1], sizes[i - 1])
        x = enlarge(layers["output_conv1"](x), (height, width))
        return layers["output_conv2"](x + UV_SCALE * uv_embedding(x, aspect))


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of (F, c, h', w') to a size; the centres of the corners are kept."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def uv_embedding(x: Tensor, aspect: float) -> Tensor:
    """Sines and cosines of the image coordinates, (c, h', w') for a map (F, c, h', w') of an image of W / H = aspect.

    Pixel centres, scaled so that the image's diagonal has length 2; half of the channels for x, then half for y.
    """
    channels, rows, columns = x.shape[1:]
    diagonal = math.hypot(aspect, 1)
    like: dict[str, Any] = {"dtype": torch.float64, "device": x.device}
    omega = UV_BASE ** (-4 * torch.arange(channels // 4, **like) / channels)
    axes = []
    for n, span in ((columns, aspect / diagonal), (rows, 1 / diagonal)):
        end = span * (n - 1) / n
        angles = omega[:, None] * torch.linspace(-end, end, n, **like)
        axes.append(torch.cat([angles.sin(), angles.cos()]).to(x.dtype))
    horizontal, vertical = axes
    return torch.cat([horizontal[:, None].expand(-1, rows, -1), vertical[:, :, None].expand(-1, -1, columns)])

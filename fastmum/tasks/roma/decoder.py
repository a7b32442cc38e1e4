"""The decoder: a coarse warp, refined at strides 16, 8, 4, 2 and 1. Names of weights are RoMa's.

Legend: B pairs, (h, w) map of a stride, (H, W) of stride 1, C channels.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmum.kernels import local_correlation
from fastmum.model.block import compute_dtype
from fastmum.tasks.roma.coarse import GP, CoarseDecoder, anchor_flow, grid
from fastmum.tasks.roma.depthwise import DepthwiseConv

STRIDES = (16, 8, 4, 2, 1)
COARSE = 16  # the key of the encoder's maps, whatever its patch size
MOMENTUM = 0.01  # of the refiners' batch norms
DISPLACEMENT = 40 / 32  # factor of the displacement that is embedded
REFINE_INIT = 4.0  # a refinement of 1 moves the warp by a quarter of its stride


class Scale(NamedTuple):
    """Sizes of a refiner."""

    channels: int  # of the map
    projected: int
    displacement: int  # channels of the embedded displacement
    radius: int = 0  # of the local correlation; 0: none
    hidden: int | None = None  # width; None: that of the input

    @property
    def inputs(self) -> int:
        """Both features, displacement and correlation."""
        return 2 * self.projected + self.displacement + ((2 * self.radius + 1) ** 2 if self.radius else 0)


class ScaleOutput(NamedTuple):
    """Output at a stride, float32."""

    flow: Tensor  # (B, 2, h, w), refined
    certainty: Tensor  # (B, 1, h, w), logit
    delta_flow: Tensor  # (B, 2, h, w), output of the refiner, before scaling
    anchor_logits: Tensor | None = None  # (B, anchors, h, w), coarse stride only
    anchor_certainty: Tensor | None = None  # (B, 1, h, w), logit


class Refiner(nn.Module):
    """Refines a warp by features, their warped counterparts, displacement and local correlation."""

    compiled_compute = None

    def __init__(self, scale: Scale, hidden_blocks: int) -> None:
        super().__init__()
        self.radius, hidden = scale.radius, scale.hidden or scale.inputs
        self.block1 = _block(scale.inputs, hidden)
        self.hidden_blocks = nn.Sequential(*(_block(hidden, hidden) for _ in range(hidden_blocks)))
        self.out_conv = nn.Conv2d(hidden, 3, 1)
        self.disp_emb = nn.Conv2d(2, scale.displacement, 1)

    def forward(self, a: Tensor, b: Tensor, flow: Tensor, scale_factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Features (B, C, h, w) and a warp (B, 2, h, w) -> change of the warp (B, 2, h, w), of the certainty."""
        dtype, device = compute_dtype(a), a.device.type
        with torch.autocast(device, enabled=False):
            parts = [a, F.grid_sample(b, flow.permute(0, 2, 3, 1), align_corners=False)]
            shift = flow - grid(flow.shape[2:], flow.device)
            parts.append(self.disp_emb(DISPLACEMENT * scale_factor * shift))
            if self.radius:
                parts.append(local_correlation(a.to(dtype), b.to(dtype), flow, self.radius))
        x = torch.cat([part.to(dtype, memory_format=torch.channels_last) for part in parts], 1)
        x = (self.compiled_compute or Refiner._compute)(self, x)
        with torch.autocast(device, enabled=False):
            return self.out_conv(x.float()).split([2, 1], 1)

    def _compute(self, x: Tensor) -> Tensor:
        return self.hidden_blocks(self.block1(x))


def _block(inputs: int, width: int) -> nn.Sequential:
    """Depthwise 5x5, batch norm, ReLU, 1x1. If the first widens, it has one group per input channel."""
    return nn.Sequential(
        DepthwiseConv(inputs, width, 5), nn.BatchNorm2d(width, momentum=MOMENTUM),
        nn.ReLU(inplace=True), nn.Conv2d(width, width, 1),
    )  # fmt: skip


class Decoder(nn.Module):
    """Maps of two images by stride -> warps from the first to the second.

    Args:
        scales: sizes by stride.
        gp_dim, num_heads, blocks: of Gaussian process and transformer, whose width is gp_dim + the coarse projection.
        anchors: side of the grid of anchors.
        hidden_blocks: of each refiner, after the first block.
    """

    def __init__(
        self, scales: Mapping[int, Scale], gp_dim: int, num_heads: int, blocks: int, anchors: int, hidden_blocks: int
    ) -> None:
        super().__init__()
        width = gp_dim + scales[COARSE].projected
        self.embedding_decoder = CoarseDecoder(width, num_heads, blocks, anchors**2)
        self.gps = nn.ModuleDict({str(COARSE): GP(gp_dim)})
        self.proj = nn.ModuleDict()
        for stride, s in scales.items():
            self.proj[str(stride)] = nn.Sequential(nn.Conv2d(s.channels, s.projected, 1), nn.BatchNorm2d(s.projected))
        self.conv_refiner = nn.ModuleDict({str(stride): Refiner(s, hidden_blocks) for stride, s in scales.items()})

    def exact(self) -> list[nn.Module]:
        """Modules that compute in float32: those that RoMa keeps in it, anchors and displacement."""
        ends = [part for refiner in self.conv_refiner.values() for part in (refiner.out_conv, refiner.disp_emb)]
        return [self.gps, self.proj, self.embedding_decoder.to_out, *ends]  # type: ignore[list-item]

    def forward(
        self, maps_a: Mapping[int, Tensor], maps_b: Mapping[int, Tensor], start: tuple[Tensor, Tensor] | None = None,
        scale_factor: float = 1.0, strides: Sequence[int] = STRIDES,
    ) -> dict[int, ScaleOutput]:  # fmt: skip
        """Outputs by stride.

        Args:
            maps_a, maps_b: (B, C, h, w) by stride.
            start: flow and certainty of any size to refine, instead of the coarse matching.
            scale_factor: of displacements, for images of other sizes than in training: the root of the areas' ratio.
            strides: those of the outputs, coarse to fine; without `start` the first is the coarse one.
        """
        H, W = maps_a[1].shape[2:]
        outputs = dict[int, ScaleOutput]()
        for stride in strides:
            key, anchors = str(stride), tuple[Tensor, ...]()
            with torch.autocast(maps_a[stride].device.type, enabled=False):
                a, b = (self.proj[key](maps[stride].float()) for maps in (maps_a, maps_b))
                posterior = self.gps[key](a, b) if start is None else None
            if start is None:
                anchors = logits, certainty = self.embedding_decoder(posterior, a)
                flow = anchor_flow(logits)
            else:
                flow, certainty = (F.interpolate(x.detach(), a.shape[2:], mode="bilinear") for x in start)
            delta_flow, delta_certainty = self.conv_refiner[key](a, b, flow, scale_factor)
            flow = flow + delta_flow * (stride / REFINE_INIT / torch.tensor([W, H], device=a.device))[:, None, None]
            start = flow, certainty + delta_certainty
            outputs[stride] = ScaleOutput(*start, delta_flow, *anchors)
        return outputs

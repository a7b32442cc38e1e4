"""Monocular depth from frozen tokens: DINOv2's linear heads, their losses and schedule, DINOv3's variant.

Sources: facebookresearch/dinov2, `eval/depth` and its released configurations; facebookresearch/dinov3, `eval/depth`;
supplement, section B, "Monocular depth estimation".

Legend: B images, P patches of the grid (h, w), n blocks, D width, C = channels of a head, K = 256 bins, H W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmum.data.evaluation import pad
from fastmum.features import FeatureCache, frozen_tokens
from fastmum.geometry import View
from fastmum.model.encoder import Encoder

Loss = Literal["sig", "cross_entropy"]
BINS = 256
MIN_DEPTH = 1e-3  # metres, the first bin
FLOOR = 0.1  # of the weight of a bin
EPS = 1e-3  # metres, added before logarithms
MEAN_WEIGHT = 0.15  # of the squared mean in `sig_loss`; the variance has weight 1
GRADIENT_WEIGHT = 0.5
STRIDES = (1, 2, 4, 6)  # of `gradient_loss`
WARM_UP, WARM_UP_RATIO, LEAST = 1 / 3, 1e-3, 1e-8  # share of the steps; of the learning rate: the first, the last
MOMENTUM, PEAK = (0.95, 0.85), 0.3  # of AdamW's beta1 by OneCycle, and where it is least
MEAN_ONLY = 1 / 384  # share of the steps, 100 of 38,400, in which `sig_loss` has only its mean


@dataclass(frozen=True)
class HeadKind:
    """A linear head; the defaults are those of DINOv2's `lin.4`."""

    layers: int = 4  # the last block, or four blocks
    cls: bool = True  # CLS is concatenated to every patch of its block
    upsample: int = 4  # of the logits; DINOv2 upsamples the features before its 1x1 convolution, which is the same
    norm: bool = False  # tokens after the encoder's last norm
    batch_norm: bool = False  # before the convolution (DINOv3: over the batch of all devices)
    gradient: float = GRADIENT_WEIGHT  # weight of `gradient_loss`
    beta2: float = 0.999  # of AdamW


LINEAR = {  # DINOv2's
    "lin1": HeadKind(layers=1), "lin4": HeadKind(),
    "lin1-nocls": HeadKind(layers=1, cls=False), "lin4-nocls": HeadKind(cls=False),
}  # fmt: skip
HEADS = LINEAR | {
    "dinov3": HeadKind(1, cls=False, upsample=1, norm=True, batch_norm=True, gradient=0.0, beta2=0.99),
}  # fmt: skip


def head_blocks(depth: int, layers: int) -> list[int]:
    """Numbers of the blocks that a head of an encoder with `depth` blocks reads.

    The last one, or four at even intervals; of 24 blocks 4, 11, 17, 23, as in DINOv2 (DINOv3 calls 4 incorrect).
    """
    if layers == 1:
        return [depth - 1]
    return [4, 11, 17, 23] if depth == 24 else sorted({max(0, i * depth // 4 - 1) for i in range(1, 5)})


class DepthHead(nn.Module):
    """Logits of 256 bins of depth from tokens; `conv_depth` has the shapes and the order of channels of DINOv2's.

    `loss="cross_entropy"` reads logits as those of a softmax, where DINOv2's weights are relu(z) + 0.1 over their sum.
    """

    bins: Tensor

    def __init__(
        self, kind: HeadKind, width: int, blocks: int, max_depth: float, loss: Loss = "sig", bins: int = BINS,
        min_depth: float = MIN_DEPTH,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind, self.loss = kind, loss
        channels = blocks * width * (1 + kind.cls)
        self.norm = nn.BatchNorm2d(channels) if kind.batch_norm else nn.Identity()
        self.conv_depth = nn.Conv2d(channels, bins, 1)
        if kind.batch_norm:
            nn.init.normal_(self.conv_depth.weight, std=0.01)
            nn.init.constant_(cast(Tensor, self.conv_depth.bias), 0)
        self.register_buffer("bins", torch.linspace(min_depth, max_depth, bins))  # metres, both ends included

    @classmethod
    def of(cls, encoder: Encoder, kind: HeadKind, max_depth: float, loss: Loss = "sig") -> Self:
        """A head on the tokens of an encoder, on its device."""
        blocks = len(head_blocks(encoder.config.depth, kind.layers))
        head = cls(kind, encoder.config.embed_dim, blocks, max_depth, loss)
        return head.to(next(encoder.parameters()).device)

    def forward(self, patch: Tensor, cls: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Patch tokens (B, n, P, D) and CLS (B, n, D) of this head's blocks -> logits (B, K, h', w'), `upsample` h."""
        x = patch
        if self.kind.cls:
            assert cls is not None
            x = torch.cat([x, cls[:, :, None].expand_as(x)], -1)
        x_BChw = x.transpose(1, 2).flatten(2).mT.unflatten(2, grid)
        logits = self.conv_depth(self.norm(x_BChw))
        if self.kind.upsample == 1:
            return logits
        return F.interpolate(logits, scale_factor=self.kind.upsample, mode="bilinear", align_corners=False)

    def depth(self, logits: Tensor) -> Tensor:
        """Expected depth (B, 1, h', w') of logits (B, K, h', w'), metres."""
        if self.loss == "cross_entropy":
            return torch.einsum("bkhw,k->bhw", logits.softmax(1), self.bins)[:, None]
        ones_and_bins = torch.stack([torch.ones_like(self.bins), self.bins])
        sums = F.conv2d(logits.relu(), ones_and_bins[:, :, None, None], FLOOR * ones_and_bins.sum(1))
        return sums[:, 1:] / sums[:, :1]

    def losses(self, logits: Tensor, true: Tensor, mean_only: bool = False) -> Tensor:
        """The loss of logits against true depth (B, 1, H, W), 0 where unknown."""
        depth = resize(self.depth(logits), true.shape[2:])
        main = self._cross_entropy(logits, true) if self.loss == "cross_entropy" else sig_loss(depth, true, mean_only)
        return main + self.kind.gradient * gradient_loss(depth, true) if self.kind.gradient else main

    def _cross_entropy(self, logits: Tensor, true: Tensor) -> Tensor:
        """Of the logits at the size of the true depth against its bin; depth beyond the last bin is unknown."""
        low, high = self.bins[0], self.bins[-1]
        target = ((true - low) / (high - low) * (len(self.bins) - 1)).round().long().clamp(0)
        target = torch.where((true > 0) & (true <= high), target, -1)[:, 0]
        if not (target >= 0).any():
            return logits.sum() * 0
        return F.cross_entropy(resize(logits, true.shape[2:]), target, ignore_index=-1)


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, h, w) at another size, bilinear."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def sig_loss(depth: Tensor, true: Tensor, mean_only: bool = False) -> Tensor:
    """Scale-invariant loss of maps (B, 1, H, W): sqrt(var(g) + 0.15 mean(g)^2) of the logarithms' differences g.

    Over pixels with true > 0 of the whole batch, unbiased; 0 with fewer than two of them. `mean_only` leaves the
    variance out, as DINOv2 does in its first 100 calls.
    """
    g = _log_ratio(depth, true)[true > 0]
    if len(g) < 2:
        return depth.sum() * 0
    spread = torch.zeros_like(g[0]) if mean_only else g.var()
    return (spread + MEAN_WEIGHT * g.mean() ** 2).clamp(min=1e-12).sqrt()


def gradient_loss(depth: Tensor, true: Tensor) -> Tensor:
    """Differences |g[i + 2] - g[i]| of `sig_loss`'s g along rows and columns, at several strides (DINOv3's axes).

    At each stride the sum over pixels that are known at both ends, divided by the number of known pixels.
    (DINOv2's form differences batch and channels, and so is 0.)
    """
    known = true > 0
    g, total = torch.where(known, _log_ratio(depth, torch.where(known, true, 1.0)), 0.0), depth.sum() * 0
    for stride in STRIDES:
        g_s, known_s = g[..., ::stride, ::stride], known[..., ::stride, ::stride]
        for axis in (2, 3):
            n = g_s.shape[axis] - 2
            if n > 0:
                both = known_s.narrow(axis, 2, n) & known_s.narrow(axis, 0, n)
                difference = (g_s.narrow(axis, 2, n) - g_s.narrow(axis, 0, n)).abs()
                total = total + (difference * both).sum() / known_s.sum().clamp(min=1)
    return total


def _log_ratio(depth: Tensor, true: Tensor) -> Tensor:
    return (depth + EPS).log() - (true + EPS).log()


def learning_rate_factor(step: int, steps: int) -> float:
    """Of the learning rate at a step from 0: cosine to 1e-8, times a linear warm-up from 0.001 over a third of it."""
    cosine = LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * step / steps))
    warm = 1 - (1 - min(1.0, step / max(1.0, WARM_UP * steps))) * (1 - WARM_UP_RATIO)
    return cosine * warm


def momentum(step: int, steps: int) -> float:
    """AdamW's beta1 at a step from 0: cosine from 0.95 to 0.85 over 30 % of the steps, and back (mmcv's OneCycle)."""
    (high, low), turn = MOMENTUM, max(1.0, PEAK * steps - 1)
    share = step / turn if step <= turn else (step - turn) / max(1.0, steps - 1 - turn)
    start, end = (high, low) if step <= turn else (low, high)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


class EncodedImages:
    """Tokens of images after the blocks that any head reads, computed once for all heads, on the encoder's device."""

    def __init__(self, encoder: Encoder, images: Tensor, cache: FeatureCache | None = None) -> None:
        """`images` (B, H, W, 3) uint8 on the CPU; sides are multiples of the patch size. Errors of `frozen_tokens`."""
        device, depth = next(encoder.parameters()).device, encoder.config.depth
        self.blocks, self.encoder = feature_blocks(depth), encoder
        patch, cls = frozen_tokens(encoder, images, self.blocks, cache)
        self.patch, self.cls = (None if x is None else x.to(device, torch.float32) for x in (patch, cls))
        self.grid = images.shape[1] // encoder.config.patch_size, images.shape[2] // encoder.config.patch_size

    @torch.no_grad()
    def of(self, kind: HeadKind) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """The arguments of a head."""
        assert self.patch is not None
        own = [self.blocks.index(block) for block in head_blocks(self.encoder.config.depth, kind.layers)]
        found = [None if x is None else x[:, own] for x in (self.patch, self.cls)]
        if kind.norm:
            dtype = self.encoder.norm.weight.dtype
            found = [None if x is None else self.encoder.norm(x.to(dtype)).float() for x in found]
        patch, cls = found
        assert patch is not None
        return patch, cls, self.grid


def feature_blocks(depth: int) -> list[int]:
    """Numbers of the blocks that any head reads."""
    return sorted({*head_blocks(depth, 1), *head_blocks(depth, 4)})


def fit_patches(view: View, encoder: Encoder) -> View:
    """The view in the middle of the smallest one whose sides are multiples of the patch size (DINOv2, DINOv3).

    The rest has the encoder's mean colour and no depth.
    """
    p = encoder.config.patch_size
    width, height = (-(-side // p) * p for side in view.size)
    return pad(view, (width, height), [round(255 * value) for value in encoder.mean])


def scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Width and height with another longer side."""
    width, height = (max(1, round(side * longest / max(size))) for side in size)
    return width, height


@torch.no_grad()
def predict_depth(
    heads: Sequence[DepthHead], encoder: Encoder, image: np.ndarray, cache: FeatureCache | None = None
) -> Tensor:
    """Depth of an image (H, W, 3) uint8 by each head, (Q, H, W) float32 on the CPU, metres.

    The mean of the depths of the image and of its mirror image, each within the range of the bins.
    """
    fitted = fit_patches(View(image), encoder).image
    pixels = torch.from_numpy(np.stack([fitted, fitted[:, ::-1]]))
    encoded, (height, width), found = EncodedImages(encoder, pixels, cache), image.shape[:2], []
    top, left = (fitted.shape[0] - height) // 2, (fitted.shape[1] - width) // 2
    for head in heads:
        depth = head.depth(head(*encoded.of(head.kind)))
        both = resize(depth, fitted.shape[:2])[:, 0].clamp(head.bins[0], head.bins[-1])
        mean = (both[0] + both[1].flip(-1)) / 2
        found.append(mean[top : top + height, left : left + width].cpu())
    return torch.stack(found)

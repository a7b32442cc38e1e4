"""Depthwise convolution, with a weight gradient for the CPU.

oneDNN computes the forward pass of a depthwise convolution at tens of operations per nanosecond, but its weight
gradient 20 times as slowly, and in bfloat16 100 times. Here the gradient is a forward pass, too: the gradient of the
output, cut into tiles, is the kernel of a depthwise convolution over the tiles of the input.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 14  # pixels; divides the maps of 224, 448 and 560 px at most strides


class DepthwiseConv(nn.Conv2d):
    """A convolution with one group per input channel, of odd kernel and the same size of output."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, groups=inputs)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or self.out_channels != self.in_channels or x.dtype == torch.float64:
            return super().forward(x)
        assert self.bias is not None
        return _Depthwise.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        (C, _, k, _), pad = weight.shape, weight.shape[2] // 2
        args = grad, x, weight, None, (1, 1), (pad, pad), (1, 1), False, (0, 0), C, (True, False, False)
        grad_x = torch.ops.aten.convolution_backward(*args)[0]
        with torch.autocast(x.device.type, enabled=False):
            grad_weight, grad_bias = weight_gradient(x, grad, k), grad.sum((0, 2, 3), dtype=torch.float32)
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def weight_gradient(x: Tensor, grad: Tensor, k: int) -> Tensor:
    """Gradient (C, 1, k, k) float32 of the weight, from input and gradient of the output, (B, C, H, W) each."""
    C, H, W = x.shape[1:]
    bottom, right, pad = -H % TILE, -W % TILE, k // 2
    x_BHWC = F.pad(x.permute(0, 2, 3, 1), (0, 0, pad, pad + right, pad, pad + bottom))
    grad_BHWC = F.pad(grad.permute(0, 2, 3, 1), (0, 0, 0, right, 0, bottom))
    side = TILE + k - 1
    # Tiles of all images and channels are the channels of the convolution, and innermost in memory.
    tiles = x_BHWC.unfold(1, side, TILE).unfold(2, side, TILE).permute(4, 5, 0, 1, 2, 3).float()
    tiles = tiles.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    kernels = grad_BHWC.unfold(1, TILE, TILE).unfold(2, TILE, TILE).float().reshape(-1, 1, TILE, TILE)
    return F.conv2d(tiles, kernels, groups=len(kernels)).view(-1, C, k, k).sum(0)[:, None]

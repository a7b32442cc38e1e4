"""Guarded memory and random problems of the kernel tests."""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = {torch.uint8: 255, torch.int64: 1 << 40, torch.int32: 1 << 28}  # around a tensor
GUARD = 64  # values before and after a guarded tensor


def pairs(first: Sequence, second: Sequence, *others: Sequence) -> list[tuple]:
    """All pairs of values of the first two axes; the other axes are cycled along both."""
    return [
        (a, b, *(x[(i + j + i // len(x)) % len(x)] for x in others))
        for (i, a), (j, b) in product(enumerate(first), enumerate(second))
    ]


def guarded(x: Tensor) -> Tensor:
    """A copy of `x` surrounded by NaN (255 for uint8, ids out of range for integers), to detect reads out of bounds."""
    memory = torch.full((x.numel() + 2 * GUARD,), FILL.get(x.dtype, float("nan")), dtype=x.dtype, device=x.device)
    return memory[GUARD:-GUARD].view(x.shape).copy_(x)


def strided(x: Tensor) -> Tensor:
    """A copy of `x` as every second element along every axis of a larger tensor of such values."""
    memory = torch.full([2 * n for n in x.shape], FILL.get(x.dtype, float("nan")), dtype=x.dtype, device=x.device)
    return memory[(slice(None, None, 2),) * x.ndim].copy_(x)


def split_ids(frames: int, patches: int, visible: int, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Random visible and masked patch numbers, in random order: (frames, visible), (frames, patches - visible)."""
    order = torch.rand(frames, patches, device=DEVICE).argsort(1).to(dtype)
    return order[:, :visible].clone(), order[:, visible:].clone()


def results(function: Callable, inputs: Sequence[Tensor], *weights: Tensor) -> list[Tensor]:
    """The outputs of `function`, and the gradients of its inputs for the sum of outputs * weights."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs = function(*inputs)
    outs = [outs] if isinstance(outs, Tensor) else outs
    grads = [weight.to(out.dtype) for out, weight in zip(outs, weights, strict=True)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, grads)]


def double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() for x in tensors]

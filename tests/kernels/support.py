"""What the kernel tests share: the truth in float64, tolerances, guarded memory and random problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GUARD = 64  # values before and after a guarded tensor


def relative(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|, or |value| where the truth is 0."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape
    norm = truth.norm()
    return float((value - truth).norm() / (norm if norm > 0 else 1.0))


def assert_close(value: Tensor, truth: Tensor, plain: Tensor | None = None) -> None:
    """Within 1e-5 of the truth; in bfloat16 and float16 within 1.1 times the error of plain PyTorch in that dtype.

    The ratio of two errors of n values is known to about 1 / sqrt(n).
    """
    if value.dtype in (torch.float32, torch.float64):
        assert relative(value, truth) <= 1e-5
    else:
        assert plain is not None
        # A rounding unit beside it: plain PyTorch may happen to be exact where the truth is not.
        bound = (1.1 + 5 / max(value.numel(), 1) ** 0.5) * relative(plain, truth)
        assert relative(value, truth) <= max(bound, torch.finfo(value.dtype).eps / 4)


def guarded(x: Tensor) -> Tensor:
    """A copy of `x` amid NaN (255 for uint8, an id that no frame has for integers): reading beside it shows."""
    fill = {torch.uint8: 255, torch.int64: 1 << 40, torch.int32: 1 << 28}.get(x.dtype, float("nan"))
    memory = torch.full((x.numel() + 2 * GUARD,), fill, dtype=x.dtype, device=x.device)
    inner = memory[GUARD:-GUARD].view(x.shape)
    inner.copy_(x)
    return inner


def strided(x: Tensor) -> Tensor:
    """A copy of `x` as every second element along every axis of a larger tensor full of NaN."""
    fill = 255 if x.dtype == torch.uint8 else float("nan") if x.is_floating_point() else 1 << 28
    memory = torch.full([2 * n for n in x.shape], fill, dtype=x.dtype, device=x.device)
    inner = memory[(slice(None, None, 2),) * x.ndim]
    inner.copy_(x)
    return inner


def split_ids(frames: int, patches: int, visible: int, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Random visible and masked patch numbers, in random order: (frames, visible), (frames, patches - visible)."""
    order = torch.rand(frames, patches, device=DEVICE).argsort(1).to(dtype)
    return order[:, :visible].clone(), order[:, visible:].clone()


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
    """The result of `function` and the gradients of its inputs for sum(result * weight)."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, weight.to(out.dtype))

"""Matrix products of the library; bfloat16 ones in float32 on CPUs that have no bfloat16 instructions.

There the library multiplies bfloat16 in plain loops, 8 to 180 times slower than float32. Widening operands does not
change their values, and the result is rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SLOW_BFLOAT16 = not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # no AVX-512 or later


def widens(x: Tensor) -> bool:
    """Whether products with `x` are computed in float32 and rounded."""
    return SLOW_BFLOAT16 and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (..., M, K) @ b (..., K, N) + bias (N,), all of one dtype; matrices only if there is a bias."""
    if widens(a):
        with torch.autocast("cpu", enabled=False):
            wide = a.float() @ b.float()
            return (wide if bias is None else wide.add_(bias)).to(a.dtype)
    return a @ b if bias is None else torch.addmm(bias, a, b)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., K) @ weight' (N, K) + bias (N,), all of one dtype; differentiable."""
    return _Linear.apply(x, weight, bias) if widens(x) else F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return product(x.flatten(0, -2), weight.t(), bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        (x, weight), rows = ctx.saved_tensors, grad.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight) if needs_x else None,
            product(rows.t(), x.flatten(0, -2)) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )

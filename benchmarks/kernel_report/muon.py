"""Cases of the report: kernels of Muon.

The stacks of a model are its matrices, with q, k and v apart, by shape. By formula products read each operand once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from benchmarks.kernel_report.blocks import FP32, _table_bytes
from benchmarks.kernel_report.cases import Case, short, zeros
from fastmum.kernels import muon, symmetric


def symmetric_case(shape: tuple[int, int, int], dtype: torch.dtype, way: str = "") -> Case:
    """Matrices in, products out; or "add": and symmetric matrices, the tiles computed, in."""
    n, r, c = shape
    x, add = zeros(n, r, c, dtype=dtype), zeros(n, r, r, dtype=dtype) if way == "add" else None
    block, _ = symmetric.tile_sizes(dtype)
    heights = [min(block, r - first) for first in range(0, r, block)]
    lower = sum(height * min(r, (i + 1) * block) for i, height in enumerate(heights))
    return Case(
        f"symmetric {way or 'product'} {n}x{r}x{c} {short(dtype)}",
        lambda: symmetric._symmetric_triton(x, 1.0, add, 1.0),
        ("a", "b", "out", *(("add",) if way == "add" else ())),
        x.nbytes + dtype.itemsize * n * (r * r + (lower if way == "add" else 0)),
        operations=n * len(heights) * (len(heights) + 1) * block * block * c,
    )


def momentum_case(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Case:
    """Momenta, gradients and their table in; momenta and updates, in the dtype of the gradients, out."""
    momenta, (grads, updates) = _tensors(shapes, FP32), (_tensors(shapes, dtype) for _ in range(2))
    return Case(
        f"muon momentum {short(dtype)}",
        lambda: muon._momentum_triton(momenta, grads, updates, 0.95, zeros(dtype=FP32)),
        ("mean", "grads", "ahead"),
        sum(map(prod, shapes)) * (2 * 4 + 2 * dtype.itemsize) + _table_bytes(shapes, 3),
    )


def apply_case(shapes: Sequence[tuple[int, ...]], split: bool) -> Case:
    """Weights, updates and their table in; weights, float32 or halves, out. Updates have the dtype of the weights."""
    dtype = torch.bfloat16 if split else FP32
    weights, updates = (_tensors(shapes, dtype) for _ in range(2))
    rests, scales = _tensors(shapes, torch.int16) if split else [], [1.0] * len(shapes)
    return Case(
        f"muon apply {'halves' if split else 'fp32'}",
        lambda: muon._apply_triton(weights, rests, updates, 1e-3, scales, 0.05, zeros(dtype=FP32)),
        ("weight", "updates", *(("rest",) if split else ())),
        sum(map(prod, shapes)) * (2 * 4 + dtype.itemsize) + _table_bytes(shapes, 4),
    )


def _tensors(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    return [zeros(*shape, dtype=dtype) for shape in shapes]

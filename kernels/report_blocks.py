"""Cases of the report: what is inside the blocks, and of the optimiser. See `report_cases`.

Products read each operand once by formula: a tile is read again by its neighbours, from the second-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastmum.kernels import adamw, feedforward, norm, projection, sums
from fastmum.kernels.report_cases import Case, Sizes, meta, short
from fastmum.kernels.tables import CHUNK
from fastmum.kernels.total_norm import _root_kernel, _squares_kernel, _total_norm_triton

MLP_RATIO = 4
FP32, INT64 = torch.float32, torch.int64


def add_norm_case(s: Sizes, dtype: torch.dtype, per_frame: int) -> Case:
    """Stream, update and the norm's vectors in; stream, normed and one value of every token out."""
    T, D = s.frames * per_frame, s.width
    x, update, vector = meta(T, D, dtype=FP32), meta(T, D, dtype=dtype), meta(D, dtype=FP32)
    return Case(
        f"add_norm forward {T}x{D} {short(dtype)}",
        lambda: norm._add_norm_triton(x, update, vector, vector, 1e-5, dtype),
        ("x", "update", "total", "normed"),
        2 * T * D * (4 + dtype.itemsize) + 4 * T + 2 * 4 * D,
    )


def add_norm_backward_case(s: Sizes, dtype: torch.dtype, per_frame: int, last: bool = False) -> Case:
    """Gradients of stream (behind the last block there is none) and normed, and normed in; two gradients out."""
    T, D = s.frames * per_frame, s.width
    grad_total, normed, rstd = None if last else meta(T, D, dtype=FP32), meta(T, D, dtype=dtype), meta(T, 1, dtype=FP32)
    vector, same = meta(D, dtype=FP32), dtype == FP32
    values = dtype.itemsize * (2 if same else 3) + 4 * (1 if last else 2)
    return Case(
        f"add_norm backward{' last' if last else ''} {T}x{D} {short(dtype)}",
        lambda: norm._backward_triton(grad_total, normed, normed, rstd, vector, vector, FP32, dtype),
        ("grad_normed", "normed", "grad_x", *(() if last else ("grad_total",)), *(() if same else ("grad_update",))),
        T * D * values + 4 * T + 2 * 4 * D,
        ("partial",),
        norm._add_norm_backward_kernel,
    )


def linear_gelu_case(s: Sizes, dtype: torch.dtype, per_frame: int, keep: bool) -> Case:
    """Tokens, weight and bias in; what is behind the GELU out, and what is before it where that is kept."""
    T, D, N = s.frames * per_frame, s.width, MLP_RATIO * s.width
    x, weight, bias = meta(T, D, dtype=dtype), meta(N, D, dtype=dtype), meta(N, dtype=dtype)
    return Case(
        f"linear_gelu{' keep' if keep else ''} {T}x{D} {short(dtype)}",
        lambda: feedforward._linear_gelu_triton(x, weight, bias, keep),
        ("a", "b", "active", *(("hidden",) if keep else ())),
        dtype.itemsize * (T * D + N * D + N + (1 + keep) * T * N),
        operations=2 * T * D * N,
    )


def linear_gelu_backward_case(s: Sizes, dtype: torch.dtype, per_frame: int, keep: str) -> Case:
    """Gradient and weight in, and hidden values or what they are made of; their gradient (and GELU) out."""
    T, D, N = s.frames * per_frame, s.width, MLP_RATIO * s.width
    grad, weight, hidden = meta(T, D, dtype=dtype), meta(D, N, dtype=dtype), meta(T, N, dtype=dtype)
    first = meta(T, D, dtype=dtype), meta(N, D, dtype=dtype), meta(N, dtype=dtype)
    made = (None, first) if keep == "input" else (hidden, None)
    values = T * D + N * D + T * N + (T * D + N * D + N if keep == "input" else T * N) + (T * N if keep != "all" else 0)
    streams = ("a", "b", "grad_hidden"), ("hidden",) * (keep != "input"), ("active",) * (keep != "all")
    return Case(
        f"linear_gelu backward {keep} {T}x{D} {short(dtype)}",
        lambda: feedforward._backward_triton(grad, weight, *made, keep != "all"),
        sum(streams, ()),
        dtype.itemsize * values,
        ("partial",),
        feedforward._linear_gelu_backward_kernel,
        operations=2 * T * D * N * (2 if keep == "input" else 1),
    )


def gelu_backward_case(s: Sizes, dtype: torch.dtype, per_frame: int, again: bool) -> Case:
    """Where products are the library's: gradient behind and values before the GELU in; gradient (and GELU) out."""
    T, N = s.frames * per_frame, MLP_RATIO * s.width
    hidden = meta(T, N, dtype=dtype)
    return Case(
        f"gelu_backward{' again' if again else ''} {T}x{N} {short(dtype)}",
        lambda: feedforward._gelu_backward_triton(hidden, hidden, again),
        ("grad", "hidden", "grad_hidden", *(("active",) if again else ())),
        dtype.itemsize * T * N * (4 if again else 3),
        ("partial",),
        feedforward._gelu_backward_kernel,
    )


def rotary_linear_case(s: Sizes, dtype: torch.dtype, per_frame: int, parts: str) -> Case:
    """Tokens, weight, bias, positions and tables in; q, k and v, or some of them, out."""
    T, D, half = s.frames * per_frame, s.width, s.width // s.heads // 2
    N = len(parts) * D
    x, weight, bias = meta(T, D, dtype=dtype), meta(N, D, dtype=dtype), meta(N, dtype=dtype)
    positions, (sin, cos) = meta(T, dtype=INT64), _tables(s)
    rotated = s.heads * len(parts.removesuffix("v"))
    return Case(
        f"rotary_linear {parts} {T}x{D} h={s.heads} {short(dtype)}",
        lambda: projection._rotary_linear_triton(x, weight, bias, positions, sin, cos, rotated, False),
        ("x", "weight", "packed"),
        dtype.itemsize * (T * D + N * D + N + T * N) + 8 * T + 2 * 4 * s.patches * half,
        operations=2 * T * D * N,
    )


def pack_case(s: Sizes, dtype: torch.dtype, per_frame: int, parts: str) -> Case:
    """Gradients of q, k and v, or of some of them, positions and tables in; the same side by side out."""
    T, half = s.frames * per_frame, s.width // s.heads // 2
    grads = [meta(T, s.heads, 2 * half, dtype=dtype) for _ in parts]
    out, positions, (sin, cos) = meta(T, len(parts) * s.width, dtype=dtype), meta(T, dtype=INT64), _tables(s)
    rotated = len(parts.removesuffix("v"))
    return Case(
        f"pack {parts} {T}x{s.width} h={s.heads} {short(dtype)}",
        lambda: projection._pack_triton(out, grads, positions, sin, cos, rotated, False),
        ("grad", "out"),
        2 * out.nbytes + 8 * T + 2 * 4 * s.patches * half,
        ("partial",),
        projection._pack_kernel,
    )


def finish_sums_case(count: int, programs: int, width: int, dtype: torch.dtype) -> Case:
    """Partial sums in, sums out."""
    partial = meta(count, programs, width, dtype=FP32)
    return Case(
        f"finish_sums {count} x {programs} x {width} {short(dtype)}",
        lambda: sums.finish_sums(partial, [dtype] * count),
        ("partial",),
        partial.nbytes + count * width * dtype.itemsize,
    )


def squares_case(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Case:
    """All gradients and their table in, a partial sum of every chunk out."""
    tensors = [meta(*shape, dtype=dtype) for shape in shapes]
    return Case(
        f"total_norm squares {short(dtype)}",
        lambda: _total_norm_triton([tensors]),
        ("x",),
        sum(x.nbytes for x in tensors) + _table_bytes(shapes, 1),
        ("sums",),
        _squares_kernel,
    )


def root_case(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Case:
    """The partial sums in, the norm out: a few kB, whose loads are as wide as their number allows."""
    tensors = [meta(*shape, dtype=dtype) for shape in shapes]
    return Case(
        "total_norm root",
        lambda: _total_norm_triton([tensors]),
        (),
        4 * _chunks(shapes) + 4,
        kernel=_root_kernel,
    )


def adamw_case(shapes: Sequence[tuple[int, ...]], split: bool) -> Case:
    """Weights, gradients, both moments and their table in; all but gradients out.

    Weights lie in two halves, and gradients are bfloat16; or weights and gradients are float32.
    """
    bf16, values = torch.bfloat16, sum(map(_numel, shapes))

    def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
        return [meta(*shape, dtype=dtype) for shape in shapes]

    dtype = bf16 if split else FP32
    weights, grads, moments = tensors(dtype), tensors(dtype), [tensors(FP32) for _ in range(2)]
    rests, scalar = tensors(torch.int16) if split else [], meta(dtype=FP32)
    return Case(
        f"adamw {'halves' if split else 'fp32'}",
        lambda: adamw._adamw_triton(weights, grads, *moments, rests, scalar, 1e-4, 0.9, 0.95, 0.05, 1e-8, scalar),
        ("weight", "grads", "mean", "square", *(("rest",) if split else ())),
        values * (2 * (4 + 4 + 4) + dtype.itemsize) + _table_bytes(shapes, adamw.COLUMNS),
    )


def matrices(s: Sizes, blocks: int) -> list[tuple[int, int]]:
    """Shapes of a stack's weights."""
    D = s.width
    return [(3 * D, D), (D, D), (MLP_RATIO * D, D), (D, MLP_RATIO * D)] * blocks


def _tables(s: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    half = s.width // s.heads // 2
    sin, cos = (meta(s.patches, 2 * half, dtype=FP32)[:, :half] for _ in range(2))
    return sin, cos


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _chunks(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(-(-_numel(shape) // CHUNK) for shape in shapes)


def _table_bytes(shapes: Sequence[tuple[int, ...]], columns: int) -> int:
    return 8 * (len(shapes) * (columns + 1) + 2 * _chunks(shapes))

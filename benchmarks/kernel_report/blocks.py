"""Cases of the report: kernels inside the blocks, and of the optimiser.

By formula products read each operand once: neighbouring tiles read it again from the L2 cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.kernel_report.cases import Case, Sizes, rotation, short, zeros
from fastmum.kernels import adamw, feedforward, norm, projection, sums
from fastmum.kernels.plans import HOSTS
from fastmum.kernels.total_norm import CHUNK, _root_kernel, _squares_kernel, _total_norm_triton

MLP_RATIO = 4
FP32 = torch.float32


def add_norm_case(s: Sizes, dtype: torch.dtype, per_frame: int) -> Case:
    """Stream, update and the norm's vectors in; stream, normed and one value of every token out."""
    T, D = s.frames * per_frame, s.width
    x, update, vectors = zeros(T, D, dtype=FP32), zeros(T, D, dtype=dtype), zeros(3, D, dtype=FP32)
    return Case(
        f"add_norm forward {T}x{D} {short(dtype)}",
        lambda: HOSTS["fastmum::add_norm"](x, update, *vectors, 1e-5, dtype),
        ("x", "update", "total", "normed"),
        2 * T * D * (4 + dtype.itemsize) + 4 * T + 2 * 4 * D,
    )


def add_norm_backward_case(s: Sizes, dtype: torch.dtype, per_frame: int, last: bool = False) -> Case:
    """Gradients of stream (none after the last block) and normed, and normed in; two gradients out."""
    T, D = s.frames * per_frame, s.width
    grad_total, rstd = None if last else zeros(T, D, dtype=FP32), zeros(T, 1, dtype=FP32)
    (grad_normed, normed), vectors, same = zeros(2, T, D, dtype=dtype), zeros(2, D, dtype=FP32), dtype == FP32
    values = dtype.itemsize * (2 if same else 3) + 4 * (1 if last else 2)
    return Case(
        f"add_norm backward{' last' if last else ''} {T}x{D} {short(dtype)}",
        lambda: HOSTS["fastmum::add_norm_backward"](grad_total, grad_normed, normed, rstd, *vectors, FP32, dtype),
        ("grad_normed", "normed", "grad_x", *(() if last else ("grad_total",)), *(() if same else ("grad_update",))),
        T * D * values + 4 * T + 2 * 4 * D,
        ("partial",),
        norm._add_norm_backward_kernel,
    )


def linear_gelu_case(s: Sizes, dtype: torch.dtype, per_frame: int, keep: bool) -> Case:
    """Tokens, weight and bias in; the GELU's output out, and with `keep` its input."""
    T, D, N = s.frames * per_frame, s.width, MLP_RATIO * s.width
    x, weight, bias = zeros(T, D, dtype=dtype), zeros(N, D, dtype=dtype), zeros(N, dtype=dtype)
    return Case(
        f"linear_gelu{' keep' if keep else ''} {T}x{D} {short(dtype)}",
        lambda: feedforward._linear_gelu_triton(x, weight, bias, keep),
        ("a", "b", "active", *(("hidden",) if keep else ())),
        dtype.itemsize * (T * D + N * D + N + (1 + keep) * T * N),
        operations=2 * T * D * N,
    )


def linear_gelu_backward_case(s: Sizes, dtype: torch.dtype, per_frame: int, recompute: str) -> Case:
    """Gradient and weight in, and hidden values or their inputs; gradient of hidden (and GELU) out."""
    T, D, N = s.frames * per_frame, s.width, MLP_RATIO * s.width
    grad, weight, hidden = zeros(T, D, dtype=dtype), zeros(D, N, dtype=dtype), zeros(T, N, dtype=dtype)
    first = zeros(T, D, dtype=dtype), zeros(N, D, dtype=dtype), zeros(N, dtype=dtype)
    whole, again = recompute == "mlp", recompute != "none"
    inputs = (None, *first) if whole else (hidden, None, None, None)
    values = T * D + N * D + T * N + (T * D + N * D + N if whole else T * N) + again * T * N
    streams = ("a", "b", "grad_hidden"), ("hidden",) * (not whole), ("active",) * again
    return Case(
        f"linear_gelu backward {recompute} {T}x{D} {short(dtype)}",
        lambda: feedforward._backward_triton(grad, weight, *inputs, again),
        sum(streams, ()),
        dtype.itemsize * values,
        ("partial",),
        feedforward._linear_gelu_backward_kernel,
        operations=2 * T * D * N * (1 + whole),
    )


def gelu_backward_case(s: Sizes, dtype: torch.dtype, per_frame: int, again: bool) -> Case:
    """With library products: output gradient and input of the GELU in; input gradient (and GELU) out."""
    T, N = s.frames * per_frame, MLP_RATIO * s.width
    grad, hidden = zeros(2, T, N, dtype=dtype)
    return Case(
        f"gelu_backward{' again' if again else ''} {T}x{N} {short(dtype)}",
        lambda: feedforward._gelu_backward_triton(grad, hidden, again),
        ("grad", "hidden", "grad_hidden", *(("active",) if again else ())),
        dtype.itemsize * T * N * (4 if again else 3),
        ("partial",),
        feedforward._gelu_backward_kernel,
    )


def rotary_linear_case(s: Sizes, dtype: torch.dtype, per_frame: int, parts: str) -> Case:
    """Tokens, weight, bias, positions and tables in; q, k and v, or some of them, out."""
    T, D, half = s.frames * per_frame, s.width, s.width // s.heads // 2
    N = len(parts) * D
    x, weight, bias = zeros(T, D, dtype=dtype), zeros(N, D, dtype=dtype), zeros(N, dtype=dtype)
    tables, rotated = rotation(s, per_frame), s.heads * len(parts.removesuffix("v"))
    return Case(
        f"rotary_linear {parts} {T}x{D} h={s.heads} {short(dtype)}",
        lambda: projection._rotary_linear_triton(x, weight, bias, *tables, rotated, False),
        ("x", "weight", "packed"),
        dtype.itemsize * (T * D + N * D + N + T * N) + 8 * T + 2 * 4 * s.patches * half,
        operations=2 * T * D * N,
    )


def pack_case(s: Sizes, dtype: torch.dtype, per_frame: int, parts: str) -> Case:
    """Gradients of q, k and v, or some of them, positions and tables in; the packed gradient out."""
    T, half = s.frames * per_frame, s.width // s.heads // 2
    grads = [zeros(T, s.heads, 2 * half, dtype=dtype) for _ in parts]
    out, tables = zeros(T, len(parts) * s.width, dtype=dtype), rotation(s, per_frame)
    rotated = len(parts.removesuffix("v"))
    return Case(
        f"pack {parts} {T}x{s.width} h={s.heads} {short(dtype)}",
        lambda: projection._pack_triton(*tables, rotated, False, *grads),
        ("grad", "out"),
        2 * out.nbytes + 8 * T + 2 * 4 * s.patches * half,
        ("partial",),
        projection._pack_kernel,
    )


def finish_sums_case(count: int, programs: int, width: int, dtype: torch.dtype) -> Case:
    """Partial sums in, sums out."""
    partial = zeros(count, programs, width, dtype=FP32)
    return Case(
        f"finish_sums {count} x {programs} x {width} {short(dtype)}",
        lambda: sums.finish_sums(partial, [dtype] * count),
        ("partial",),
        partial.nbytes + count * width * dtype.itemsize,
    )


def squares_case(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Case:
    """All gradients and their table in, one partial sum per chunk out."""
    tensors = [zeros(*shape, dtype=dtype) for shape in shapes]
    return Case(
        f"total_norm squares {short(dtype)}",
        lambda: _total_norm_triton([tensors]),
        ("x",),
        sum(x.nbytes for x in tensors) + _table_bytes(shapes, 1),
        ("sums",),
        _squares_kernel,
    )


def root_case(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Case:
    """The partial sums in, the norm out: a few kB."""
    tensors = [zeros(*shape, dtype=dtype) for shape in shapes]
    return Case(
        "total_norm root",
        lambda: _total_norm_triton([tensors]),
        (),
        4 * _chunks(shapes) + 4,
        kernel=_root_kernel,
    )


def adamw_case(shapes: Sequence[tuple[int, ...]], split: bool) -> Case:
    """Weights, gradients, both moments and their table in; all but gradients out.

    Either weights are two halves and gradients bfloat16, or both are float32.
    """
    bf16, values = torch.bfloat16, sum(map(_numel, shapes))

    def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
        return [zeros(*shape, dtype=dtype) for shape in shapes]

    dtype = bf16 if split else FP32
    weights, grads, moments = tensors(dtype), tensors(dtype), [tensors(FP32) for _ in range(2)]
    rests, scalar = tensors(torch.int16) if split else [], zeros(dtype=FP32)
    return Case(
        f"adamw {'halves' if split else 'fp32'}",
        lambda: adamw._adamw_triton(weights, grads, *moments, rests, 1 + scalar, 1e-4, 0.9, 0.95, 0.05, 1e-8, scalar),
        ("weight", "grads", "mean", "square", *(("rest",) if split else ())),
        values * (2 * (4 + 4 + 4) + dtype.itemsize) + _table_bytes(shapes, adamw.COLUMNS),
    )


def matrices(s: Sizes, blocks: int) -> list[tuple[int, int]]:
    """Shapes of a stack's weights."""
    D = s.width
    return [(3 * D, D), (D, D), (MLP_RATIO * D, D), (D, MLP_RATIO * D)] * blocks


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _chunks(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(-(-_numel(shape) // CHUNK) for shape in shapes)


def _table_bytes(shapes: Sequence[tuple[int, ...]], columns: int) -> int:
    return 8 * (len(shapes) * (columns + 1) + 2 * _chunks(shapes))

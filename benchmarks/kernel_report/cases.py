"""Cases of the report: a kernel in one dtype and size, with its bytes by formula. Here those outside the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastmum.kernels import loss, patches, rope, tokens

GAIN, BIAS = (0.017,) * 3, (2.0,) * 3
DEVICE = "meta"  # tests run the cases on the CPU, interpreted


class Sizes(NamedTuple):
    """A training step on one GPU; the defaults are the paper's (supplement, sections A and B)."""

    frames: int = 96
    side: int = 256
    patch: int = 16
    width: int = 768
    heads: int = 12

    @property
    def patches(self) -> int:
        """P."""
        return (self.side // self.patch) ** 2

    @property
    def visible(self) -> int:
        """K, a quarter."""
        return self.patches // 4

    @property
    def masked(self) -> int:
        """M."""
        return self.patches - self.visible


class Case(NamedTuple):
    """A kernel in one dtype and size.

    Args:
        name: printed.
        call: the host wrapper with meta tensors.
        main: names of the kernel's large tensors; the operands of `product_tile` are a and b. Empty if all are small.
        least: bytes that any implementation moves.
        partial: names of partial sums, written by this kernel and read by another, beyond the least.
        kernel: the kernel of the case, if the call launches several.
        operations: of matrix products.
    """

    name: str
    call: Callable[[], object]
    main: tuple[str, ...]
    least: int
    partial: tuple[str, ...] = ()
    kernel: Callable | None = None
    operations: int = 0


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on `DEVICE`."""
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def patch_ids(s: Sizes, count: int) -> Tensor:
    """(F, count) random distinct patch numbers."""
    return torch.rand(s.frames, s.patches, device=DEVICE).argsort(1)[:, :count].contiguous()


def rotation(s: Sizes, per_frame: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions (T,) of the tokens of a frame, CLS first, and halves of tables (P, d / 2)."""
    half = s.width // s.heads // 2
    positions = torch.arange(-1, per_frame - 1, device=DEVICE).repeat(s.frames)
    sin, cos = (zeros(s.patches, 2 * half, dtype=torch.float32)[:, :half] for _ in range(2))
    return positions, sin, cos


def gather_patches_case(s: Sizes, dtype: torch.dtype) -> Case:
    """Pixels and ids in, patch vectors out."""
    frames, ids = zeros(s.frames, s.side, s.side, 3, dtype=torch.uint8), patch_ids(s, s.visible)
    values = s.frames * s.visible * 3 * s.patch**2
    return Case(
        f"gather_patches u8->{short(dtype)}",
        lambda: patches._gather_patches_triton(frames, ids, GAIN, BIAS, s.patch, dtype),
        ("frames", "out"),
        values * (1 + dtype.itemsize) + 8 * ids.numel(),
    )


def patch_loss_case(s: Sizes, dtype: torch.dtype, backward: bool) -> Case:
    """Predictions, pixels and ids in; one partial sum per patch, or the gradient out."""
    frames, ids = zeros(s.frames, s.side, s.side, 3, dtype=torch.uint8), patch_ids(s, s.masked)
    pred = zeros(s.frames, s.masked, 3 * s.patch**2, dtype=dtype)
    out = zeros(*(pred.shape if backward else (ids.numel(),)), dtype=dtype if backward else torch.float32)
    grad_losses = zeros(s.frames, dtype=torch.float32) if backward else None
    return Case(
        f"patch_loss {'backward' if backward else 'forward'} {short(dtype)}",
        lambda: loss._launch(out, grad_losses, pred, frames, ids, GAIN, BIAS, s.patch, True, 1e-6),
        ("pred", "frames", "out") if backward else ("pred", "frames"),
        pred.numel() * (1 + dtype.itemsize * (1 + backward)) + 8 * ids.numel() + (4 * s.frames if backward else 0),
        () if backward else ("out",),
    )


def scatter_case(s: Sizes, dtype: torch.dtype) -> Case:
    """Visible tokens, mask token and ids in, all tokens out."""
    visible, ids = zeros(s.frames, 1 + s.visible, s.width, dtype=dtype), patch_ids(s, s.visible)
    mask_token = zeros(s.width, dtype=torch.float32)
    values = s.frames * (2 + s.visible + s.patches) * s.width
    return Case(
        f"scatter_tokens forward {short(dtype)}",
        lambda: tokens._place(visible, mask_token, ids, s.patches),
        ("source", "out"),
        values * dtype.itemsize + 8 * ids.numel() + 4 * s.width,
    )


def scatter_backward_case(s: Sizes, dtype: torch.dtype) -> Case:
    """Gradients of all tokens and ids in, those of visible tokens and partial sums of the masked ones out."""
    grad, ids = zeros(s.frames, 1 + s.patches, s.width, dtype=dtype), patch_ids(s, s.visible)
    values = s.frames * (2 + s.visible + s.patches) * s.width
    return Case(
        f"scatter_tokens backward {short(dtype)}",
        lambda: tokens._scatter_tokens_backward_triton(grad, ids),
        ("grad", "grad_visible"),
        values * dtype.itemsize + 8 * ids.numel() + 4 * s.width,
        ("partial",),
    )


def gather_case(s: Sizes, dtype: torch.dtype) -> Case:
    """Selected tokens and ids in, the same tokens out."""
    x, ids = zeros(s.frames, 1 + s.patches, s.width, dtype=dtype), patch_ids(s, s.masked)
    return Case(
        f"gather_tokens forward {short(dtype)}",
        lambda: tokens._gather_tokens_triton(x, ids),
        ("tokens", "out"),
        2 * s.frames * s.masked * s.width * dtype.itemsize + 8 * ids.numel(),
    )


def gather_backward_case(s: Sizes, dtype: torch.dtype) -> Case:
    """Gradients of selected tokens and ids in, those of all tokens out."""
    grad, ids = zeros(s.frames, s.masked, s.width, dtype=dtype), patch_ids(s, s.masked)
    return Case(
        f"gather_tokens backward {short(dtype)}",
        lambda: tokens._place(grad, None, ids, s.patches),
        ("source", "out"),
        s.frames * (1 + s.patches + s.masked) * s.width * dtype.itemsize + 8 * ids.numel(),
    )


def rope_case(s: Sizes, dtype: torch.dtype, patches_a_frame: int, copy: bool = False) -> Case:
    """q and k (and v out of place), positions and tables in; q, k (and v) out."""
    T, half = s.frames * (1 + patches_a_frame), s.width // s.heads // 2
    qkv, rotated = zeros(T, 3 * s.width, dtype=dtype), rotation(s, 1 + patches_a_frame)
    out = torch.empty_like(qkv) if copy else qkv
    values = 2 * T * (3 if copy else 2) * s.width
    return Case(
        f"rope_qk {'copy' if copy else 'in place'} d={2 * half} h={s.heads} {short(dtype)}",
        lambda: rope._rotate(qkv, out, *rotated, 2 * s.heads, False, False),
        ("qkv", "out"),
        values * dtype.itemsize + 8 * T + 2 * 4 * s.patches * half,
    )


def short(dtype: torch.dtype) -> str:
    """Name of a dtype in the report."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]

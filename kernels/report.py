"""Registers, vector accesses and bytes of every kernel at the sizes of the paper's run, without a GPU.

    python -m fastmum.kernels.report --arch sm_80 --arch sm_90

The launches are those of the host wrappers, recorded with meta tensors. Bytes are by formula: every tensor that a
kernel must touch, once ("least"), and what it moves beyond that ("moved"). The times are bounds, bytes over the
memory's nominal bandwidth: nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastmum.kernels import loss, patches, rope, tokens
from fastmum.kernels.dispatch import Launch, recorded_launches

BANDWIDTH = {80: ("A100-80GB", 2.039e12), 90: ("H200", 4.8e12)}  # bytes/s, data sheets

GAIN, BIAS = [0.017] * 3, [2.0] * 3


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


PAPER = Sizes()
ENCODER = PAPER._replace(width=1024, heads=16)
RELEASED = PAPER._replace(heads=16)  # head width 48


class Case(NamedTuple):
    """A kernel in one dtype and size.

    Args:
        name: what is printed.
        call: the host wrapper with meta tensors.
        main: the tensors that carry the bytes, by their names in the kernel.
        least: bytes that any implementation moves.
        extra: bytes beyond that: partial sums, written and read.
    """

    name: str
    call: Callable[[], object]
    main: tuple[str, ...]
    least: int
    extra: int = 0


def cases() -> list[Case]:
    """Every kernel in the dtypes and sizes of the paper's run under bfloat16 autocast, whose residuals are float32."""
    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        gather_patches_case(PAPER, bf16),
        gather_patches_case(PAPER, fp32),
        patch_loss_case(PAPER, bf16, backward=False),
        patch_loss_case(PAPER, bf16, backward=True),
        patch_loss_case(PAPER, fp32, backward=True),
        *(case(PAPER, dtype) for dtype in (fp32, bf16) for case in (scatter_case, scatter_backward_case)),
        *(case(PAPER, dtype) for dtype in (fp32, bf16) for case in (gather_case, gather_backward_case)),
        rope_case(ENCODER, bf16, ENCODER.visible),
        rope_case(PAPER, bf16, PAPER.patches),
        rope_case(RELEASED, bf16, RELEASED.patches),
        rope_case(PAPER, fp32, PAPER.patches),
        rope_case(PAPER, bf16, PAPER.patches, copy=True),
    ]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def gather_patches_case(s: Sizes, dtype: torch.dtype) -> Case:
    """Pixels and ids in, patch vectors out."""
    frames, ids = meta(s.frames, s.side, s.side, 3, dtype=torch.uint8), meta(s.frames, s.visible, dtype=torch.int64)
    values = s.frames * s.visible * 3 * s.patch**2
    return Case(
        f"gather_patches u8->{_short(dtype)}",
        lambda: patches._gather_patches_triton(frames, ids, GAIN, BIAS, s.patch, dtype),
        ("frames", "out"),
        values * (1 + dtype.itemsize) + 8 * ids.numel(),
    )


def patch_loss_case(s: Sizes, dtype: torch.dtype, backward: bool) -> Case:
    """Predictions, pixels and ids in; a partial sum of every patch, or the gradient out."""
    frames, ids = meta(s.frames, s.side, s.side, 3, dtype=torch.uint8), meta(s.frames, s.masked, dtype=torch.int64)
    pred = meta(s.frames, s.masked, 3 * s.patch**2, dtype=dtype)
    out = meta(*(pred.shape if backward else (ids.numel(),)), dtype=dtype if backward else torch.float32)
    grad_losses = meta(s.frames, dtype=torch.float32) if backward else None
    return Case(
        f"patch_loss {'backward' if backward else 'forward'} {_short(dtype)}",
        lambda: loss._launch(out, grad_losses, pred, frames, ids, GAIN, BIAS, s.patch, True, 1e-6),
        ("pred", "frames", "out") if backward else ("pred", "frames"),
        pred.numel() * (1 + dtype.itemsize * (1 + backward)) + 8 * ids.numel(),
        4 * s.frames if backward else 2 * 4 * ids.numel(),
    )


def scatter_case(s: Sizes, dtype: torch.dtype) -> Case:
    """Visible tokens, mask token and ids in, all tokens out."""
    visible, ids = meta(s.frames, 1 + s.visible, s.width, dtype=dtype), meta(s.frames, s.visible, dtype=torch.int64)
    mask_token = meta(s.width, dtype=torch.float32)
    values = s.frames * (2 + s.visible + s.patches) * s.width
    return Case(
        f"scatter_tokens forward {_short(dtype)}",
        lambda: tokens._place(visible, mask_token, ids, s.patches),
        ("source", "out"),
        values * dtype.itemsize + 8 * ids.numel() + 4 * s.width,
    )


def scatter_backward_case(s: Sizes, dtype: torch.dtype) -> Case:
    """Gradients of all tokens and ids in, those of the visible and partial sums of the masked out."""
    grad, ids = meta(s.frames, 1 + s.patches, s.width, dtype=dtype), meta(s.frames, s.visible, dtype=torch.int64)
    values = s.frames * (2 + s.visible + s.patches) * s.width
    return Case(
        f"scatter_tokens backward {_short(dtype)}",
        lambda: tokens._scatter_tokens_backward_triton(grad, ids, torch.float32),
        ("grad", "grad_visible"),
        values * dtype.itemsize + 8 * ids.numel() + 4 * s.width,
        2 * 4 * s.frames * tokens.MASK_SPLIT * s.width,
    )


def gather_case(s: Sizes, dtype: torch.dtype) -> Case:
    """Selected tokens and ids in, the same tokens out."""
    x, ids = meta(s.frames, 1 + s.patches, s.width, dtype=dtype), meta(s.frames, s.masked, dtype=torch.int64)
    return Case(
        f"gather_tokens forward {_short(dtype)}",
        lambda: tokens._gather_tokens_triton(x, ids),
        ("tokens", "out"),
        2 * s.frames * s.masked * s.width * dtype.itemsize + 8 * ids.numel(),
    )


def gather_backward_case(s: Sizes, dtype: torch.dtype) -> Case:
    """Gradients of selected tokens and ids in, those of all tokens out."""
    grad, ids = meta(s.frames, s.masked, s.width, dtype=dtype), meta(s.frames, s.masked, dtype=torch.int64)
    return Case(
        f"gather_tokens backward {_short(dtype)}",
        lambda: tokens._place(grad, None, ids, s.patches),
        ("source", "out"),
        s.frames * (1 + s.patches + s.masked) * s.width * dtype.itemsize + 8 * ids.numel(),
    )


def rope_case(s: Sizes, dtype: torch.dtype, patches_a_frame: int, copy: bool = False) -> Case:
    """q and k (and v where the result is another tensor), positions and tables in; q, k (and v) out."""
    T, half = s.frames * (1 + patches_a_frame), s.width // s.heads // 2
    qkv, positions = meta(T, 3 * s.width, dtype=dtype), meta(T, dtype=torch.int64)
    sin, cos = (meta(s.patches, 2 * half, dtype=torch.float32)[:, :half] for _ in range(2))
    out = torch.empty_like(qkv) if copy else qkv
    values = 2 * T * (3 if copy else 2) * s.width
    return Case(
        f"rope_qk {'copy' if copy else 'in place'} d={2 * half} h={s.heads} {_short(dtype)}",
        lambda: rope._rotate(qkv, out, positions, sin, cos, 2 * s.heads, False, False),
        ("qkv", "out"),
        values * dtype.itemsize + 8 * T + 2 * 4 * s.patches * half,
    )


def record(case: Case, arch: int) -> Launch:
    """The one launch that a case makes on an architecture."""
    with recorded_launches(arch) as launches:
        case.call()
    (launch,) = launches
    return launch


def report(archs: list[int]) -> list[dict[str, object]]:
    """Compile all cases for all architectures; a row each, see `main`."""
    from fastmum.kernels.compiled import compile_launch  # needs Triton

    rows = []
    for arch in archs:
        gpu, bandwidth = BANDWIDTH[arch]
        for case in cases():
            launch = record(case, arch)
            compiled = compile_launch(launch, arch)
            moved = case.least + case.extra
            rows.append(
                {
                    "arch": f"sm_{arch}",
                    "kernel": case.name,
                    "warps": launch.num_warps,
                    "registers": compiled.registers,
                    "spills": compiled.spills,
                    "shared": compiled.shared,
                    "vector": compiled.vector_share(case.main),
                    "moved": moved,
                    "ratio": moved / case.least,
                    "bound_us": moved / bandwidth * 1e6,
                    "gpu": gpu,
                }
            )
    return rows


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def main() -> None:
    """Print the report; --json for machines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=[f"sm_{arch}" for arch in BANDWIDTH], help="repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of the table")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.exit(2, "error: TRITON_INTERPRET is set, but the report compiles the kernels: unset it\n")
    rows = report([int(arch[3:]) for arch in args.arch or ["sm_80", "sm_90"]])
    if args.json:
        print(json.dumps(rows))
        return
    print(f"sizes: {PAPER}; encoder {ENCODER.width} wide; bytes by formula; times are bounds, not measurements")
    print("arch   kernel                             warps  regs  spills  shared  16-byte   MB moved  /least  bound")
    for row in rows:
        print(
            f"{row['arch']}  {row['kernel']:34} {row['warps']:5} {row['registers']:5} {row['spills']:7} "
            f"{row['shared']:7} {row['vector']:7.1%} {row['moved'] / 1e6:10.2f} {row['ratio']:7.3f}  "
            f"{row['bound_us']:.1f} us on {row['gpu']}"
        )


if __name__ == "__main__":
    main()

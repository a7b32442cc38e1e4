"""Registers, vector accesses and bytes of every kernel at the sizes of the paper's run, without a GPU.

    python -m fastmum.kernels.report --arch sm_80 --arch sm_90

The launches are those of the host wrappers, recorded with meta tensors. Bytes are by formula: every tensor that a
kernel must access, once ("least"), and with partial sums ("moved"). The times are lower bounds, bytes over the nominal
memory bandwidth or operations over the nominal speed of products: nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import NamedTuple

import torch

from benchmarks.kernel_report.blocks import (
    adamw_case,
    add_norm_backward_case,
    add_norm_case,
    finish_sums_case,
    gelu_backward_case,
    linear_gelu_backward_case,
    linear_gelu_case,
    matrices,
    pack_case,
    root_case,
    rotary_linear_case,
    squares_case,
)
from benchmarks.kernel_report.cases import (
    Case,
    Sizes,
    gather_backward_case,
    gather_case,
    gather_patches_case,
    patch_loss_case,
    rope_case,
    scatter_backward_case,
    scatter_case,
)
from benchmarks.kernel_report.matching import STRIDES, correlation_case
from benchmarks.kernel_report.muon import apply_case, momentum_case, symmetric_case
from benchmarks.launches import Launch, recorded_launches


class Gpu(NamedTuple):
    """Nominal speeds, from data sheets."""

    name: str
    bandwidth: float  # of its memory, bytes/s
    products: float  # operations/s of bfloat16 products
    tensor: int  # products and sums per cycle of a multiprocessor's tensor cores


GPUS = {80: Gpu("A100-80GB", 2.039e12, 312e12, 1024), 90: Gpu("H200", 4.8e12, 989.4e12, 2048)}


def cases(frames: int = 96) -> list[Case]:
    """Every kernel in the dtypes and sizes of a step of the paper's run, bfloat16 with a float32 residual stream."""
    bf16, fp32 = torch.bfloat16, torch.float32
    decoder = Sizes(frames)
    encoder = decoder._replace(width=1024, heads=16)
    released = decoder._replace(heads=16)  # head width 48
    # Tokens of a frame: the encoder's, the decoder's, and the queries of the last block.
    visible, all_tokens, masked = 1 + encoder.visible, 1 + decoder.patches, decoder.masked
    weights = matrices(encoder, 24) + matrices(decoder, 12)
    return [
        gather_patches_case(decoder, bf16),
        gather_patches_case(decoder, fp32),
        patch_loss_case(decoder, bf16, backward=False),
        patch_loss_case(decoder, bf16, backward=True),
        patch_loss_case(decoder, fp32, backward=True),
        *(case(decoder, dtype) for dtype in (fp32, bf16) for case in (scatter_case, scatter_backward_case)),
        *(case(decoder, dtype) for dtype in (fp32, bf16) for case in (gather_case, gather_backward_case)),
        # For float8 layers and direct calls; blocks use `rotary_linear`.
        rope_case(encoder, bf16, encoder.visible),
        rope_case(decoder, bf16, decoder.patches),
        rope_case(released, bf16, released.patches),
        rope_case(decoder, fp32, decoder.patches),
        rope_case(decoder, bf16, decoder.patches, copy=True),
        rotary_linear_case(encoder, bf16, visible, "qkv"),
        rotary_linear_case(decoder, bf16, all_tokens, "qkv"),
        rotary_linear_case(released, bf16, all_tokens, "qkv"),
        rotary_linear_case(decoder, bf16, masked, "q"),
        rotary_linear_case(decoder, bf16, all_tokens, "kv"),
        pack_case(encoder, bf16, visible, "qkv"),
        pack_case(decoder, bf16, all_tokens, "qkv"),
        pack_case(released, bf16, all_tokens, "qkv"),
        pack_case(decoder, bf16, masked, "q"),
        pack_case(decoder, bf16, all_tokens, "kv"),
        pack_case(decoder, fp32, all_tokens, "qkv"),
        add_norm_case(encoder, bf16, visible),
        add_norm_case(decoder, bf16, all_tokens),
        add_norm_case(decoder, fp32, all_tokens),
        add_norm_backward_case(encoder, bf16, visible),
        add_norm_backward_case(encoder, bf16, visible, last=True),
        add_norm_backward_case(decoder, bf16, all_tokens),
        add_norm_backward_case(decoder, bf16, masked, last=True),
        add_norm_backward_case(decoder, fp32, all_tokens),
        # `model.recompute=mlp` is "act" in the encoder and "mlp" in the decoder.
        linear_gelu_case(encoder, bf16, visible, keep=True),
        linear_gelu_case(decoder, bf16, all_tokens, keep=False),
        linear_gelu_case(decoder, bf16, masked, keep=False),
        linear_gelu_case(decoder, bf16, all_tokens, keep=True),
        linear_gelu_backward_case(encoder, bf16, visible, "act"),
        linear_gelu_backward_case(decoder, bf16, all_tokens, "mlp"),
        linear_gelu_backward_case(decoder, bf16, masked, "mlp"),
        linear_gelu_backward_case(encoder, bf16, visible, "none"),
        linear_gelu_backward_case(decoder, bf16, all_tokens, "none"),
        gelu_backward_case(encoder, bf16, visible, again=True),
        gelu_backward_case(decoder, bf16, all_tokens, again=True),
        gelu_backward_case(encoder, bf16, visible, again=False),
        gelu_backward_case(decoder, fp32, all_tokens, again=False),
        finish_sums_case(3, 264, encoder.width, fp32),
        finish_sums_case(1, 386, 4 * decoder.width, bf16),
        squares_case(weights, bf16),
        squares_case(weights, fp32),
        root_case(weights, bf16),
        adamw_case(weights, split=True),
        adamw_case(weights, split=False),
        # Of ViT-L: q, k, v and outputs, or an MLP's both (one transposed), of the encoder, and of the decoder.
        symmetric_case((96, 1024, 1024), bf16),
        symmetric_case((96, 1024, 1024), bf16, "add"),
        symmetric_case((48, 1024, 4096), bf16),
        symmetric_case((24, 768, 3072), bf16),
        symmetric_case((48, 768, 768), bf16),
        symmetric_case((48, 768, 768), bf16, "add"),
        symmetric_case((96, 1024, 1024), fp32),
        symmetric_case((96, 1024, 1024), fp32, "add"),
        symmetric_case((48, 1024, 4096), fp32),
        momentum_case(weights, bf16),
        momentum_case(weights, fp32),
        apply_case(weights, split=True),
        apply_case(weights, split=False),
        *(correlation_case(stride, bf16, back) for stride in STRIDES for back in (False, True)),
        *(correlation_case(stride, fp32, False) for stride in STRIDES),
    ]


def record(case: Case, arch: int) -> Launch:
    """The launch of a case on an architecture."""
    with recorded_launches(arch) as launches:
        case.call()
    (launch,) = (launch for launch in launches if case.kernel in (None, launch.kernel))
    return launch


def moved(case: Case, launch: Launch) -> int:
    """Bytes of a case: the least, and partial sums, written and read."""
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    return case.least + sum(2 * values[f"{name}_ptr"].nbytes for name in case.partial)


def epilogue_share(case: Case, launch: Launch, instructions: int, gpu: Gpu) -> float | None:
    """Cycles in which a program issues its instructions behind products, over those in which tensor cores compute them.

    A multiprocessor issues four instructions of a warp per cycle. None without products of fixed sizes.
    """
    c = launch.constants
    if "BLOCK_K" not in c or "K" not in c:
        return None
    columns = c["BLOCK_N"] if "BLOCK_N" in c else 2 * c["BLOCK_H"] * c["BLOCK_C"]
    tile = c["BLOCK_M"] * columns * c["K"]
    products = round(case.operations / 2 / tile / launch.grid[0])
    return instructions * launch.num_warps / 4 / (products * tile / gpu.tensor)


def report(archs: list[int]) -> list[dict[str, object]]:
    """Compile all cases for all architectures; a row each, see `main`."""
    from benchmarks.kernel_report.compiled import compile_launch, identity  # needs Triton

    rows, compiled = [], {}
    for arch in archs:
        gpu = GPUS[arch]
        for case in cases():
            launch = record(case, arch)
            key = arch, identity(launch)
            if key not in compiled:
                compiled[key] = compile_launch(launch, arch)
            made, total = compiled[key], moved(case, launch)
            rows.append(
                {
                    "arch": f"sm_{arch}",
                    "kernel": case.name,
                    "warps": launch.num_warps,
                    "registers": made.registers,
                    "spills": made.spills,
                    "shared": made.shared,
                    "behind": made.epilogue,
                    "epilogue": epilogue_share(case, launch, made.epilogue, gpu),
                    "vector": made.vector_share(case.main) if case.main else None,
                    "moved": total,
                    "ratio": total / case.least,
                    "bound_us": max(total / gpu.bandwidth, case.operations / gpu.products) * 1e6,
                    "bound_by": "bytes" if total / gpu.bandwidth >= case.operations / gpu.products else "products",
                    "gpu": gpu.name,
                }
            )
    return rows


def main() -> None:
    """Print the report; --json for machines."""
    parser = argparse.ArgumentParser("python -m fastmum.kernels.report", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=[f"sm_{arch}" for arch in GPUS], help="repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of the table")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.exit(2, "error: TRITON_INTERPRET is set, but the report compiles the kernels: unset it\n")
    rows = report([int(arch[3:]) for arch in args.arch or ["sm_80", "sm_90"]])
    if args.json:
        print(json.dumps(rows))
        return
    print(f"sizes: {Sizes()}; encoder 1024 wide; bytes by formula; times are bounds, not measurements")
    print("behind: instructions behind products; epilogue: cycles to issue them, over those of the tensor cores")
    print(f"arch   {'kernel':42} warps  regs  spills  shared  behind  epilogue  16-byte   MB moved  /least  bound")
    for row in rows:
        products = "     -         -" if row["epilogue"] is None else f"{row['behind']:6}  {row['epilogue']:8.1%}"
        vector = "      -" if row["vector"] is None else f"{row['vector']:7.1%}"
        print(
            f"{row['arch']}  {row['kernel']:42} {row['warps']:5} {row['registers']:5} {row['spills']:7} "
            f"{row['shared']:7}  {products}  {vector} {row['moved'] / 1e6:11.2f} {row['ratio']:7.3f}  "
            f"{row['bound_us']:.1f} us by {row['bound_by']} on {row['gpu']}"
        )


if __name__ == "__main__":
    main()

"""Products of a step, fused with the operations after them and by the library: do they agree, which is faster.

The nine products of a step of `mum_vitl16` with 96 frames of 256 px that Triton can fuse, Muon's symmetric products,
and some operations that have no choice. The library's have a process of their own, since `FASTMUM_PRODUCTS` may be
read once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.duel import largest_error
from benchmarks.gpu.efficiency import ELEMENTWISE, LIBRARY_PRODUCT, NORM, TRITON_PRODUCT
from benchmarks.gpu.measure import milliseconds, this_device, this_gpu
from benchmarks.gpu.record import Record, stage_main
from benchmarks.gpu.stages import ROOT
from fastmum.kernels import add_norm, orthogonalize, symmetric_product
from fastmum.kernels.matmul import fuses_products
from fastmum.kernels.muon import NEWTON_SCHULZ

WAYS = {"fused": "fused", "library": "library"}  # values of FASTMUM_PRODUCTS
# Tokens, width, heads: 65 visible tokens of a frame, 257 in the decoder, 192 masked ones in its last block.
SHAPES = {"encoder": (96 * 65, 1024, 16), "decoder": (96 * 257, 768, 12), "last block": (96 * 192, 768, 12)}
SMALL_SHAPES = {"small": (72, 32, 2)}
POSITIONS = 256  # patches of a frame
MATRICES = 48  # in a stack of Muon: those of an MLP of 24 blocks


class Call(NamedTuple):
    """An operation.

    Args:
        what: its name.
        run: returns new tensors.
        plain: the same in plain PyTorch.
        flops: operations of its products.
    """

    what: str
    run: Callable[[], tuple[Tensor, ...]]
    plain: Callable[[], tuple[Tensor, ...]]
    flops: int


class Inputs:
    """Random tensors on the device."""

    def __init__(self) -> None:
        self._generator = torch.Generator(this_device()).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return scale * torch.randn(shape, generator=self._generator, device=this_device(), dtype=dtype)


def calls(tokens: int, width: int, heads: int) -> list[Call]:
    """The fused products of a block: the MLP's first, forward and backward, and the projection to q, k and v."""
    ops, normal, hidden, half = torch.ops.fastmum, Inputs(), 4 * width, width // heads // 2
    x, grad = normal(tokens, width), normal(tokens, width)
    weight1, bias1 = normal(hidden, width, scale=width**-0.5), normal(hidden)
    weight2 = normal(width, hidden, scale=hidden**-0.5)
    weight, bias = normal(3 * width, width, scale=width**-0.5), normal(3 * width)
    positions = torch.arange(-1, POSITIONS, device=x.device).repeat(tokens // POSITIONS + 1)[:tokens].contiguous()
    sin, cos = (normal(POSITIONS, half, dtype=torch.float32) for _ in range(2))

    def backward() -> tuple[Tensor, ...]:
        before = F.linear(x, weight1, bias1)
        through = torch.ops.aten.gelu_backward((grad @ weight2).float(), before.float())
        return through.to(x.dtype), through.sum(0).to(x.dtype), F.gelu(before)

    def rotated() -> tuple[Tensor, ...]:
        packed = F.linear(x, weight, bias).unflatten(1, (3 * heads, 2, half)).float()
        turned, (a, b) = (positions >= 0)[:, None, None], packed[:, : 2 * heads].unbind(2)
        s, c = sin[positions.clamp(min=0)][:, None], cos[positions.clamp(min=0)][:, None]
        both = torch.stack([torch.where(turned, a * c - b * s, 0), torch.where(turned, b * c + a * s, 0)], 2)
        return (torch.cat([both, packed[:, 2 * heads :]], 1).flatten(1).to(x.dtype),)

    product = 2 * tokens * width * hidden
    return [
        Call("gelu(x w + b)", lambda: ops.linear_gelu(x, weight1, bias1, False)[1:],
             lambda: (F.gelu(F.linear(x, weight1, bias1)),), product),
        Call("its backward, recomputed",
             lambda: ops.linear_gelu_backward(grad, weight2, None, x, weight1, bias1, True), backward, 2 * product),
        Call("rotated q, k, v",
             lambda: (ops.rotary_linear(x, weight, bias, positions, sin, cos, 2 * heads, True),), rotated,
             3 * product // 4),
    ]  # fmt: skip


def measure(record: Record, small: bool, words: list[str]) -> bool:
    """Both ways, then what has no choice; False if one of them is wrong."""
    if words:  # the other process
        for row in rows(small):
            record.row(**row)
        return True
    os.environ |= {"FASTMUM_PRODUCTS": WAYS["fused"], "FASTMUM_KERNELS": "triton"}
    x = torch.empty(1, 1, dtype=torch.bfloat16, device=this_device())
    if not fuses_products(x, "linear_gelu", x):
        raise RuntimeError(f"FASTMUM_PRODUCTS={WAYS['fused']} does not fuse products here")
    fused, library, gpu, wins, sound = list(rows(small)), by_library(record.file, small), this_gpu(), 0, True
    for ours, theirs in zip(fused, library, strict=True):
        agree = ours["of_tolerance"] <= 1 and theirs["of_tolerance"] <= 1
        wins, sound = wins + (ours["ms"] < theirs["ms"]), sound and agree
        record.row(
            blocks=ours["blocks"], product=ours["product"], fused_ms=ours["ms"], library_ms=theirs["ms"],
            fused_tflops=ours["tflops"], library_tflops=theirs["tflops"], fused_error=ours["error"],
            library_error=theirs["error"], agree=agree,
        )  # fmt: skip
        record.share(TRITON_PRODUCT, gpu and ours["tflops"] * 1e12 / gpu.peak)
    shapes, rounds = (SMALL_SHAPES, 1) if small else (SHAPES, None)
    for shape, (tokens, width, _) in shapes.items():
        measure_others(record, shape, tokens, width, rounds)
    for width in dict.fromkeys(width for _, width, _ in shapes.values()):
        sound &= measure_symmetric(record, width, rounds)
    record.headline = f"{'all agree' if sound else 'WRONG RESULTS'}; fused is faster at {wins} of {len(fused)} products"
    record.write()
    return sound


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Time and error of every product, as the environment selects it."""
    for shape, sizes in (SMALL_SHAPES if small else SHAPES).items():
        for call in calls(*sizes):
            error, of_tolerance = largest_error(call.run(), call.plain())
            (ms,) = milliseconds({"": call.run}, 1 if small else None).values()
            yield {
                "blocks": shape, "product": call.what, "ms": ms, "tflops": call.flops / ms / 1e9, "error": error,
                "of_tolerance": of_tolerance,
            }  # fmt: skip


def by_library(file: Path, small: bool) -> list[dict[str, Any]]:
    """`rows` in a process that uses the library."""
    out = file.with_name(f"{file.stem}-library.json")
    words = [sys.executable, "-m", "benchmarks.gpu.products", "library", "--out", str(out)]
    environment = os.environ | {"FASTMUM_PRODUCTS": WAYS["library"]}
    subprocess.run([*words, *(["--small"] if small else [])], cwd=ROOT, env=environment, check=True)
    return json.loads(out.read_text(encoding="utf-8"))["rows"]


def measure_others(record: Record, shape: str, tokens: int, width: int, rounds: int | None) -> None:
    """Products of the library alone, an addition, and a sum with a layer norm."""
    normal, gpu, values = Inputs(), this_gpu(), tokens * width
    x, y, weight, hidden = (
        normal(tokens, width),
        normal(tokens, width),
        normal(4 * width, width),
        normal(tokens, 4 * width),
    )
    stream, scale, shift = (normal(*size, dtype=torch.float32) for size in ((tokens, width), (width,), (width,)))
    out, update_bias = torch.empty_like(x), torch.zeros_like(x[0])
    runs: dict[str, tuple[str, int, Callable[[], Tensor | tuple[Tensor, ...]]]] = {
        "product": (LIBRARY_PRODUCT, 8 * values * width, lambda: F.linear(x, weight)),
        "gradient of the weight": (LIBRARY_PRODUCT, 8 * values * width, lambda: hidden.t() @ x),
        "addition": (ELEMENTWISE, 6 * values, lambda: torch.add(x, y, out=out)),
        "sum and norm": (NORM, 12 * values, lambda: add_norm(stream, x, update_bias, scale, shift, dtype=x.dtype)),
    }
    for what, (kind, work, run) in runs.items():
        (ms,) = milliseconds({what: run}, rounds).values()
        rate = work / ms * 1e3  # operations or bytes a second
        is_product = kind == LIBRARY_PRODUCT
        record.row(
            blocks=shape, operation=what, ms=ms, tflops=rate / 1e12 if is_product else None,
            gb_per_s=None if is_product else rate / 1e9,
        )  # fmt: skip
        record.share(kind, gpu and rate / (gpu.peak if is_product else gpu.bandwidth))


def measure_symmetric(record: Record, width: int, rounds: int | None) -> bool:
    """Muon's symmetric products by our kernel and by the library, and whole polar factors, of blocks' matrices."""
    normal, sound = Inputs(), True
    for columns in (width, 4 * width):
        x = normal(2 if rounds else MATRICES, width, columns, scale=columns**-0.5)
        gram = x @ x.mT
        pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "x x'": (lambda x=x: symmetric_product(x), lambda x=x: x @ x.mT),
            "x x' + a": (lambda x=x, a=gram: symmetric_product(x, 0.5, a, 2.0),
                         lambda x=x, a=gram: torch.baddbmm(a, x, x.mT, beta=2.0, alpha=0.5)),
        }  # fmt: skip
        for what, (ours, library) in pairs.items():
            error, of_tolerance = largest_error((ours(),), (library(),))
            times = milliseconds({"kernel": ours, "library": library}, rounds)
            record.row(
                operation=what, matrices=[*x.shape], kernel_ms=times["kernel"], library_ms=times["library"],
                error=error, agree=of_tolerance <= 1,
            )  # fmt: skip
            sound &= of_tolerance <= 1
    for columns in (width, 4 * width):
        x = normal(2 if rounds else MATRICES, width, columns)
        (ms,) = milliseconds({"": lambda x=x: orthogonalize(x, NEWTON_SCHULZ)}, rounds).values()
        record.row(operation="polar factors", matrices=[*x.shape], kernel_ms=ms)
    return sound


if __name__ == "__main__":
    sys.exit(stage_main(__doc__, measure))

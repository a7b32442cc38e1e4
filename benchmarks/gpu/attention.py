"""Attention across frames: each kernel's errors, repeatability and time, with exact segments and with empty ones added.

Equal, ragged and single-frame sequences of 96 frames, heads of 64 and 48 channels, all queries and, as in the last
block, those of masked patches; within frames also the encoder's. The truth is torch's attention in float32, sequence by
sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.efficiency import attention_class
from benchmarks.gpu.measure import milliseconds, this_device, this_gpu
from benchmarks.gpu.record import Record, stage_main
from fastmum.attention import BACKENDS, Segments
from fastmum.attention.flash import activate, candidates
from fastmum.attention.varlen import Plan, attend_by

CUTS = {
    "8 x 12": (12,) * 8, "ragged": (24, 20, 16, 12, 10, 6, 4, 2, 2), "96 x 1": (1,) * 96, "4 x 24": (24,) * 4,
    "48 x 2": (2,) * 48,
}  # fmt: skip
SMALL_CUTS = {"2 x 3": (3, 3), "ragged": (3, 2, 1), "6 x 1": (1,) * 6}
TOLERANCE = 0.02  # relative, of bfloat16, as `fastmum.attention.varlen`
OTHERS = ("flash_attn", "flash_attn_4", "xformers")  # backends of packages
DENSE = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    """Queries, keys, values and the gradient of the output, (T, h, d).

    Args:
        lengths_q, lengths_k: tokens of every sequence.
        frames: of all sequences.
        views: the longest sequence that the trainer allows, in frames.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    lengths_q: list[int]
    lengths_k: list[int]
    frames: int
    views: int

    @property
    def flops(self) -> int:
        """Of the forward pass, two products; the backward pass has five."""
        return 4 * self.q[0].numel() * sum(a * b for a, b in zip(self.lengths_q, self.lengths_k, strict=True))


def problem(cut: tuple[int, ...], tokens: int, queries: int, heads: int, width: int, views: int) -> Problem:
    """Random inputs; queries, keys and values are views of one tensor, as in the model."""
    device, frames = this_device(), sum(cut)
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randn(frames * tokens, 3 * heads * width, generator=generator, device=device, dtype=dtype())
    q, k, v = packed.unflatten(1, (3, heads, width)).unbind(1)
    q = q[: frames * queries]
    grad = torch.randn(q.shape, generator=generator, device=device, dtype=dtype())
    return Problem(q, k, v, grad, [n * queries for n in cut], [n * tokens for n in cut], frames, views)


def dtype() -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if this_device().type == "cuda" else torch.float32


def passes(attend: Attend, given: Problem, backward: bool = True, wide: bool = False) -> Callable[[], list[Tensor]]:
    """A call of forward, or forward and backward; `wide` in float32."""
    tensors = [x.float() if wide else x for x in given[:4]]
    q, k, v = (x.detach().requires_grad_(backward) for x in tensors[:3])

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            out = attend(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])] if backward else [out]

    return run


def by_sequence(given: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention, one call per sequence."""
    parts = (x.transpose(0, 1)[None].split(n, 2) for x, n in
             zip((q, k, v), (given.lengths_q, given.lengths_k, given.lengths_k), strict=True))  # fmt: skip
    return torch.cat([F.scaled_dot_product_attention(*some) for some in zip(*parts, strict=True)], 2)[0].transpose(0, 1)


def dense(backend: SDPBackend, given: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention of equal sequences in one call."""
    q, k, v = (x.unflatten(0, (len(given.lengths_k), -1)).transpose(1, 2) for x in (q, k, v))
    activate("FA2")  # torch's dense attention uses the version that is active
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def segments(given: Problem, cut: tuple[int, ...], exact: bool) -> Segments:
    """As the trainer makes them; not exact: with the empty segments that CUDA graphs record."""
    tokens, queries = given.lengths_k[0] // cut[0], given.lengths_q[0] // cut[0]
    made = Segments.of_frames(cut, given.frames, queries, tokens, given.views)
    return made if exact else made._replace(sizes=None)


def kernels_here() -> tuple[str, ...]:
    """torch's kernels that the backend `flash` may choose."""
    return candidates(this_device()) if this_device().type == "cuda" else ()


def untested_kernels() -> tuple[str, ...]:
    """cuDNN, where its version is one that fastmum does not use: whether it would be sound."""
    here = kernels_here()
    if not here or "cuDNN" in here or torch.cuda.get_device_capability()[0] < 9:
        return ()
    return ("cuDNN",)


def backends_here() -> tuple[str, ...]:
    """Backends of packages that are installed; `sdpa` on a CPU."""
    device = this_device()
    names = OTHERS if device.type == "cuda" else ("sdpa",)
    return tuple(name for name in names if BACKENDS[name].why_not(device) is None)


def contestants(
    given: Problem, cut: tuple[int, ...], kernels: tuple[str, ...], backends: tuple[str, ...]
) -> dict[tuple[str, str], Attend]:
    """Kernel and kind of segments -> attention; with torch's dense kernels where sequences are equal, on a GPU."""
    device = given.q.device
    found: dict[tuple[str, str], Attend] = {}
    for kind in ("exact", "padded"):
        made = segments(given, cut, kind == "exact")
        for kernel in kernels:
            found[kernel, kind] = partial(_by_kernel, Plan(made.to(device), kernel))
        for name in backends:
            found[name, kind] = partial(_by_backend, name, BACKENDS[name].plan(made, device))
    if len(set(cut)) == 1 and device.type == "cuda":
        found |= {(f"torch {name}", "dense"): partial(dense, backend, given) for name, backend in DENSE.items()}
    return found


def _by_backend(name: str, plan: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return BACKENDS[name].attend(q, k, v, plan)


def _by_kernel(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    activate(plan.kernel)
    return attend_by(q, k, v, plan)


def distance(ours: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative distance; infinity if something is not finite."""
    pairs = [(x.float(), y.float()) for x, y in zip(ours, truth, strict=True)]
    worst = max((torch.dist(x, y) / y.norm()).item() for x, y in pairs)
    return worst if all(bool(x.isfinite().all()) for x, _ in pairs) else float("inf")


def measure(record: Record, small: bool, words: list[str]) -> bool:
    """All combinations, the most important first; False if a kernel that the trainer may choose is wrong."""
    cuts, (tokens, masked, visible), views = (SMALL_CUTS, (9, 6, 3), 4) if small else (CUTS, (257, 192, 65), 24)
    heads = [(2, 16)] if small else [(12, 64), (16, 48)]
    wrong: list[str] = []

    def add(name: str, queries: int, keys: int, h: int, width: int) -> None:
        given = problem(cuts[name], keys, queries, h, width, views)
        labels = {"cut": name, "width": width, "queries": queries, "keys": keys}
        found = contestants(given, cuts[name], kernels_here(), backends_here())
        wrong.extend(compare(record, given, cuts[name], labels, found, 1 if small else None))
        fastest = min((r for r in record.rows if "error" in r), default=None, key=_rank)
        best = f"; {fastest['cut']}: {fastest['kernel']} is fastest" if fastest else ""
        verdict = f"WRONG: {', '.join(sorted(set(wrong)))}" if wrong else "all kernels agree with float32"
        record.headline = verdict + best
        record.write()

    for queries in (tokens, masked):
        for h, width in heads:
            for name in cuts:
                add(name, queries, tokens, h, width)
    add(next(name for name, cut in cuts.items() if max(cut) == 1), visible, visible, *heads[0])  # encoder blocks
    if others := untested_kernels():
        given, cut = problem(cuts["ragged"], tokens, tokens, *heads[0], views), cuts["ragged"]
        labels = {"cut": "ragged", "width": heads[0][1], "queries": tokens, "keys": tokens}
        compare(record, given, cut, labels, contestants(given, cut, others, ()), None)
    return not wrong


def _rank(row: dict[str, Any]) -> tuple[bool, bool, float]:
    """The fastest kernel of the ragged batch at the first width is first."""
    return row["cut"] != "ragged", row["queries"] != row["keys"], row["forward_ms"] + row["backward_ms"]


def compare(
    record: Record, given: Problem, cut: tuple[int, ...], labels: dict[str, Any],
    found: dict[tuple[str, str], Attend], rounds: int | None,
) -> list[str]:  # fmt: skip
    """Rows for kernels `found` on one problem; names of the wrong ones."""
    gpu, wrong = this_gpu(), []
    truth = passes(partial(by_sequence, given), given, wide=True)()
    for (kernel, kind), attend in found.items():
        run = passes(attend, given)
        try:
            first, second = run(), run()
            error = distance(first, truth)
            same = all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
            ms = milliseconds({"forward": passes(attend, given, backward=False), "both": run}, rounds)
        except Exception as failed:  # a kernel that a library has not, or cannot run here; packages raise any type
            record.row(**labels, kernel=kernel, segments=kind, failed=str(failed).partition("\n")[0][:120])
            continue
        backward = max(ms["both"] - ms["forward"], 1e-6)
        rates = {"forward": given.flops / ms["forward"] / 1e9, "backward": 2.5 * given.flops / backward / 1e9}
        record.row(
            **labels, kernel=kernel, segments=kind, error=error, repeats=same, forward_ms=ms["forward"],
            backward_ms=backward, forward_tflops=rates["forward"], backward_tflops=rates["backward"],
        )  # fmt: skip
        if not error <= TOLERANCE:
            wrong.append(f"{kernel} ({kind})")
        name = attention_class(kernel, kind, max(cut))
        if gpu and name and error <= TOLERANCE and labels["queries"] == labels["keys"] and labels["width"] == 64:
            for way, rate in rates.items():
                record.share(f"{name}_{way}", rate * 1e12 / gpu.peak)
    return wrong


if __name__ == "__main__":
    sys.exit(stage_main(__doc__, measure))

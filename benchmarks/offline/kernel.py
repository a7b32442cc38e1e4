"""Kernels of a step, and their sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.offline.gpus import Gpu

PRODUCTS, ATTENTION, COPIES, OPTIMISER = "matrix products", "attention", "copies", "optimiser"
NORM, ATEN, POINTWISE, REDUCTIONS = "gradient norm", "aten", "Inductor pointwise", "Inductor reductions"
OURS = "fastmum "  # and the name of the Triton kernel


class Kernel(NamedTuple):
    """One launch.

    Args:
        name: of the operator, or of the Triton kernel.
        kind: its class.
        flops: operations of matrix products and attention, two per multiply-add; 0 for others.
        moved: bytes read from and written to memory, each tensor once.
    """

    name: str
    kind: str
    flops: int
    moved: int


class Cost(NamedTuple):
    """The prediction for one side.

    Args:
        kernels: of one step, in order.
        peak_bytes: peak memory; `state_bytes` of it persist between steps.
        sources: Triton kernels that were compiled for the GPU.
        spilled: those whose configurations all spill registers.
    """

    kernels: Sequence[Kernel]
    peak_bytes: int
    state_bytes: int
    sources: int
    spilled: Sequence[str]

    def summary(self, gpu: Gpu) -> dict[str, object]:
        """Sums, as they are printed in JSON; every one is a prediction."""
        return {
            "flops": sum(k.flops for k in self.kernels),
            "bytes": sum(k.moved for k in self.kernels),
            "launches": len(self.kernels),
            "peak_bytes": self.peak_bytes,
            "state_bytes": self.state_bytes,
            "predicted_ms": 1e3 * seconds(self.kernels, gpu),
            "classes": {kind: _sums(group, gpu) for kind, group in _by_kind(self.kernels).items()},
            "triton_kernels": self.sources,
            "spilled": list(self.spilled),
        }


def seconds(kernels: Iterable[Kernel], gpu: Gpu) -> float:
    """Time of the kernels, one after the other."""
    # Equal kernels are summed together, so that the sum does not depend on their order.
    alike = Counter((k.flops, k.moved) for k in kernels)
    return sum(count * gpu.seconds(*cost) for cost, count in sorted(alike.items()))


def _by_kind(kernels: Sequence[Kernel]) -> dict[str, list[Kernel]]:
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(kernel.kind, []).append(kernel)
    return dict(sorted(groups.items(), key=lambda group: -sum(k.moved for k in group[1])))


def _sums(kernels: Sequence[Kernel], gpu: Gpu) -> dict[str, float]:
    return {
        "flops": sum(k.flops for k in kernels),
        "bytes": sum(k.moved for k in kernels),
        "launches": len(kernels),
        "predicted_ms": 1e3 * seconds(kernels, gpu),
    }

"""Kernels of a step, and their sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

PRODUCTS, COPIES, OPTIMISER = "matrix products", "copies", "optimiser"
NORM, ATEN, POINTWISE, REDUCTIONS = "gradient norm", "aten", "Inductor pointwise", "Inductor reductions"
LAYER_NORM = "aten layer norm"
OURS = "fastmum "  # and the name of the Triton kernel
# Attention by fastmum's operator on packed segments, or by `scaled_dot_product_attention`: "varlen spans forward".
VARLEN, DENSE = "varlen", "dense"


class Kernel(NamedTuple):
    """One launch.

    Args:
        name: of the operator, or of the Triton kernel.
        kind: its class.
        flops: operations of matrix products and attention, two per multiply-add; 0 for others.
        moved: bytes read from and written to memory, each tensor once.
        idle: further thread blocks, without work, if segments of attention are padded for CUDA graphs.
    """

    name: str
    kind: str
    flops: int
    moved: int
    idle: int = 0


def grouped(kernels: Iterable[Kernel]) -> Counter[Kernel]:
    """Numbers of launches that cost the same, without their names."""
    return Counter(kernel._replace(name="") for kernel in kernels)


class Cost(NamedTuple):
    """What one side's step launches and holds.

    Args:
        kernels: of `grouped`.
        peak_bytes: peak memory; `state_bytes` of it persist between steps.
        sources: Triton kernels that were compiled for the GPU.
        spilled: those whose configurations all spill registers.
    """

    kernels: Mapping[Kernel, int]
    peak_bytes: int
    state_bytes: int
    sources: int = 0
    spilled: Sequence[str] = ()

    def sums(self) -> dict[str, int]:
        """Operations, bytes, launches and memory, as they are printed in JSON and recorded."""
        return {
            "flops": sum(n * kernel.flops for kernel, n in self.kernels.items()),
            "bytes": sum(n * kernel.moved for kernel, n in self.kernels.items()),
            "launches": sum(self.kernels.values()),
            "peak_bytes": self.peak_bytes,
            "state_bytes": self.state_bytes,
        }

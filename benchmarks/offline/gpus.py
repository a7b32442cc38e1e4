"""The GPUs that can be modelled, from data sheets.

NVIDIA A100 Tensor Core GPU data sheet (80GB SXM), NVIDIA H100 data sheet (SXM5), NVIDIA H200 data sheet: dense
bfloat16 Tensor Core peak, memory bandwidth and size. CUDA C++ Programming Guide, table of technical specifications by
compute capability, and the whitepapers of the A100 and H100: multiprocessors, registers, threads, shared memory, L2.
"""

from __future__ import annotations

from typing import NamedTuple

# `fastmum.engine.gpus` has 989.4e12 for the H100 and H200, from the whitepaper, for measured shares of the peak.
# Predictions use the 989e12 of the data sheets.


class Gpu(NamedTuple):
    """A GPU.

    Args:
        name: as printed.
        arch: compute capability, 80 or 90.
        peak: bfloat16 operations a second on Tensor Cores, dense.
        bandwidth: of its memory, bytes a second.
        memory: bytes.
        multiprocessors: of the chip as sold.
        shared_memory: bytes that a block may have, opted in.
        shared_memory_multiprocessor: bytes of a multiprocessor.
        l2: bytes of its second-level cache.
    """

    name: str
    arch: int
    peak: float
    bandwidth: float
    memory: int
    multiprocessors: int
    shared_memory: int
    shared_memory_multiprocessor: int
    l2: int


GPUS = {
    "a100": Gpu("A100-80GB", 80, 312e12, 2.039e12, 80 << 30, 108, 166_912, 167_936, 40 << 20),
    "h100": Gpu("H100-80GB", 90, 989e12, 3.35e12, 80 << 30, 132, 232_448, 233_472, 50 << 20),
    "h200": Gpu("H200-141GB", 90, 989e12, 4.8e12, 141 * 10**9, 132, 232_448, 233_472, 50 << 20),
}

"""The time of recorded kernels: a range, from what kernels of their class reach on a GPU.

A kernel takes the longer of operations / (peak x share) and bytes / (bandwidth x share), and a gap follows it. A step
takes the longer of its kernels and the host's time to queue them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

from benchmarks.offline.efficiency import GAP, IDLE, LEAST, Efficiency, EfficiencyError, Range
from benchmarks.offline.gpus import Gpu
from benchmarks.offline.kernel import DENSE, OURS, VARLEN, Kernel

GAPS, EMPTY = "gaps between kernels", "empty attention blocks"
Kernels = Mapping[Kernel, int]
Level = Callable[[str], int]  # of a class: 0, 1 or 2 for low, likely or high times


def everywhere(level: int) -> Level:
    """The same level for all classes."""
    return lambda _: level


class Assumptions(NamedTuple):
    """Assumptions of a prediction.

    Args:
        gpu: the GPU.
        efficiencies: of `efficiency.efficiencies`.
        attention: kernel of packed segments, "fa2", "fa3" or "cudnn".
        tma: whether our products use tensor descriptors.
        cuda_graphs: whether segments are padded, as CUDA graphs need it.
    """

    gpu: Gpu
    efficiencies: Mapping[str, Efficiency]
    attention: str = "fa2"
    tma: bool = False
    cuda_graphs: bool = False

    def class_of(self, kernel: Kernel) -> str:
        """Class of a kernel in the table; `EfficiencyError` if the GPU has none."""
        how, *rest = kernel.kind.split()
        name = "norms" if "norm" in kernel.kind or "reduction" in kernel.kind else "elementwise"
        if how in (VARLEN, DENSE):  # torch's dense attention selects cuDNN on Hopper
            library = self.attention if how == VARLEN else "cudnn" if self.gpu.arch >= 90 else "fa2"
            name = "_".join((library, *rest))
        elif kernel.flops:
            name = f"triton{'_tma' * self.tma}" if kernel.kind.startswith(OURS) else "cublas"
        if name not in self.efficiencies:
            raise EfficiencyError(f"{self.gpu.name} has no kernels of the class '{name}': give others")
        return name

    def parts(self, kernels: Kernels, level: Level) -> dict[tuple[str, str], float]:
        """Seconds on the GPU by class and kind."""
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        gpu = self.gpu
        for kernel, count in kernels.items():
            name = self.class_of(kernel)
            share = self.efficiencies[name][2 - level(name)]
            stream = self.efficiencies["elementwise"][2 - level("elementwise")] if kernel.flops else share
            work = max(kernel.flops / (share * gpu.peak), kernel.moved / (stream * gpu.bandwidth), LEAST)
            seconds[name, kernel.kind] += count * work
            seconds[GAPS, ""] += count * GAP[level(GAPS)]
            if self.cuda_graphs and kernel.idle:
                seconds[EMPTY, ""] += count * kernel.idle * IDLE[level(EMPTY)] / gpu.multiprocessors
        return seconds

    def device(self, kernels: Kernels) -> Range:
        """Seconds on the GPU."""
        return Range(*(sum(self.parts(kernels, everywhere(level)).values()) for level in range(3)))

    def step(self, kernels: Kernels, host: Range) -> Range:
        """Seconds of a step that the host queues in `host` seconds."""
        return Range(*map(max, self.device(kernels), host))

    def ratio(self, others: Kernels, kernels: Kernels, hosts: tuple[Range, Range]) -> Range:
        """Time of `others` over that of `kernels`: classes of both vary together, the rest against each other."""
        classes = [{name for name, _ in self.parts(some, everywhere(1))} for some in (others, kernels)]
        common = classes[0] & classes[1]

        def seconds(which: int, shared: int, separate: int) -> float:
            level = lambda name: shared if name in common else separate  # noqa: E731
            return max(sum(self.parts((others, kernels)[which], level).values()), hosts[which][separate])

        ratios = [[seconds(0, s, other) / seconds(1, s, 2 - other) for s in range(3)] for other in range(3)]
        return Range(min(ratios[0]), ratios[1][1], max(ratios[2]))

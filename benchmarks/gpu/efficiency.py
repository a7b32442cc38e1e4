"""Classes of work in `benchmarks.offline.efficiency`, for the shares of the peak that stages measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

LIBRARY_PRODUCT, TRITON_PRODUCT = "cublas", "triton"
ELEMENTWISE, NORM = "elementwise", "norms"
# Kernel of `benchmarks.gpu.attention` and kind of its segments -> class: ours computes sequences, torch's frames.
_ATTENTION = {
    ("FA2", "exact"): "fa2_spans", ("FA3", "exact"): "fa3_spans", ("cuDNN", "exact"): "cudnn_spans",
    ("torch flash", "dense"): "fa2_frames", ("torch cuDNN", "dense"): "cudnn_frames",
}  # fmt: skip


def attention_class(kernel: str, segments: str, views: int) -> str | None:
    """The class of attention within sequences of up to `views` frames, before "_forward"; None if there is none."""
    name = _ATTENTION.get((kernel, segments))
    return name if name and name.endswith("frames") == (views == 1) else None


def table(shares: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Shares of the peak by class -> least, median and largest as low, likely and high."""
    return {
        kind: {"low": min(some), "likely": median(some), "high": max(some)} for kind, some in shares.items() if some
    }

"""What kernels reach on a GPU, as shares of its peak or bandwidth: the one table, which measurements may override.

The table is from public measurements, read as excerpts, and from estimates. Entries of measured GPUs replace it: a JSON
file `{"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-12-01", "efficiency": {"cublas": {"likely": 0.64}}}`, with names of
`CLASSES` and optionally "low" and "high".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fastmum.errors import FastmumError
from fastmum.files import read_json


class EfficiencyError(FastmumError):
    """A class without an efficiency, or an invalid file of measurements."""


class Range(NamedTuple):
    """Low, likely and high value."""

    low: float
    likely: float
    high: float

    def scaled(self, factor: float) -> Range:
        """Each value times `factor`."""
        return Range(*(factor * value for value in self))


class Efficiency(NamedTuple):
    """Low, likely and high share of a class on a GPU, and where they are from."""

    low: float
    likely: float
    high: float
    source: str


# Shares of the dense bfloat16 peak, attention at head width 64; the last three of bandwidth.
CLASSES = {
    "cublas": "cuBLAS products",
    "triton": "Triton products",
    "triton_tma": "Triton products, TMA",
    **{
        f"{kernel.lower()}_{spans}_{way}": f"{kernel} {where} frames, {way}"
        for kernel in ("FA2", "FA3", "cuDNN")
        for spans, where in (("spans", "across"), ("frames", "within"))  # thousands of tokens; 65 or 257
        for way in ("forward", "backward")
    },
    "elementwise": "element-wise",
    "norms": "norms and reductions",
    "links": "all-gather over NVLink and network",
}
_TILES = "estimate: waste of tiles of 128 x 128"
_RATIO = "estimate: FA2 within frames, times the ratio across frames"
_FA2, _FA3 = "FlashAttention-2 paper, Dao-AILab/flash-attention#2688", "FlashAttention-3 paper, figures for width 64"
_CUDNN = "FlashAttention-3 paper, huggingface/transformers#48163"
_A100 = {
    "cublas": Efficiency(0.60, 0.68, 0.76, "triton-lang/triton#743"),
    "triton": Efficiency(0.42, 0.55, 0.66, "triton-lang/triton#743, less an estimate for the epilogue"),
    "fa2_spans_forward": Efficiency(0.48, 0.56, 0.62, _FA2),
    "fa2_spans_backward": Efficiency(0.41, 0.48, 0.54, _FA2),
    "fa2_frames_forward": Efficiency(0.15, 0.20, 0.26, _TILES),
    "fa2_frames_backward": Efficiency(0.12, 0.16, 0.20, _TILES),
    "cudnn_spans_forward": Efficiency(0.39, 0.46, 0.51, _CUDNN),
    "cudnn_spans_backward": Efficiency(0.34, 0.39, 0.44, _CUDNN),
    "cudnn_frames_forward": Efficiency(0.12, 0.16, 0.21, _RATIO),
    "cudnn_frames_backward": Efficiency(0.10, 0.13, 0.16, _RATIO),
    "elementwise": Efficiency(0.60, 0.76, 0.86, "mli/transformers-benchmarks#4"),
    "norms": Efficiency(0.46, 0.62, 0.76, "allenai/OLMo#258"),
    "links": Efficiency(0.55, 0.70, 0.80, "NVIDIA/nccl-tests#149; network: estimate"),
}
_H100 = {
    "cublas": Efficiency(0.52, 0.62, 0.73, "triton-lang/triton#2339, pytorch/FBGEMM#2766"),
    "triton": Efficiency(0.33, 0.38, 0.45, "triton-lang/triton#2339, less an estimate for the epilogue"),
    "triton_tma": Efficiency(0.43, 0.53, 0.63, "estimate: meta-pytorch/tritonbench#894 has larger products"),
    "fa2_spans_forward": Efficiency(0.30, 0.32, 0.33, _FA3),
    "fa2_spans_backward": Efficiency(0.24, 0.27, 0.29, _FA3),
    "fa2_frames_forward": Efficiency(0.09, 0.12, 0.16, _TILES),
    "fa2_frames_backward": Efficiency(0.07, 0.09, 0.115, _TILES),
    "fa3_spans_forward": Efficiency(0.42, 0.47, 0.50, _FA3),
    "fa3_spans_backward": Efficiency(0.40, 0.44, 0.48, _FA3),
    "fa3_frames_forward": Efficiency(0.09, 0.17, 0.24, _RATIO),
    "fa3_frames_backward": Efficiency(0.07, 0.145, 0.19, _RATIO),
    "cudnn_spans_forward": Efficiency(0.37, 0.40, 0.45, _CUDNN),
    "cudnn_spans_backward": Efficiency(0.36, 0.41, 0.44, _CUDNN),
    "cudnn_frames_forward": Efficiency(0.09, 0.15, 0.22, _RATIO),
    "cudnn_frames_backward": Efficiency(0.07, 0.135, 0.175, _RATIO),
    "elementwise": Efficiency(0.60, 0.75, 0.88, "accrl-training#32"),
    "norms": Efficiency(0.48, 0.60, 0.78, "pytorch/pytorch#168335"),
    "links": Efficiency(0.60, 0.75, 0.80, "NVIDIA/nccl-tests#326; network: estimate"),
}
TABLE: Mapping[str, Mapping[str, Efficiency]] = {"a100": _A100, "h100": _H100, "h200": _H100}

# Assumptions, seconds. LEAST: of any kernel. GAP: between kernels of a stream. IDLE: of a multiprocessor for a thread
# block of attention without work, 0.5 to 1 us with one or two at a time. HOST: to queue a launch; fastmum's operators
# in Python were estimated at 40 to 60 ms a step of about 1,000 launches, and are to take less than 20.
LEAST = 2e-6
GAP = Range(0.5e-6, 1e-6, 2e-6)
IDLE = Range(0.25e-6, 0.5e-6, 1e-6)
HOST = {"fastmum": Range(20e-6, 40e-6, 60e-6), "reference": Range(5e-6, 10e-6, 20e-6)}


def efficiencies(gpu: str, file: Path | None = None) -> dict[str, Efficiency]:
    """Efficiencies of a GPU by class, those in a file of measurements instead of the table's.

    Args:
        gpu: key of `TABLE`.
        file: a measurement of that GPU, as above.

    Raises:
        EfficiencyError: the file is missing, invalid or of another GPU.
    """
    table = dict(TABLE[gpu])
    if file is None:
        return table
    try:
        measured = read_json(file)
        where, date, values = str(measured["gpu"]), str(measured["date"]), dict(measured["efficiency"])
        found = {name: _filled(each) for name, each in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EfficiencyError(f"'{file}' is no file of measured efficiencies ({error!r}): see {__name__}") from None
    if gpu not in where.lower():
        raise EfficiencyError(f"'{file}' was measured on {where}, not on {gpu}: give another --gpu or --efficiency")
    for name, shares in found.items():
        if name not in CLASSES or not 0 < shares.low <= shares.likely <= shares.high:
            raise EfficiencyError(
                f"'{file}' has efficiency.{name} = {values[name]}, but must have a class of {__name__}.CLASSES and "
                "0 < low <= likely <= high"
            )
        table[name] = Efficiency(*shares, f"measured on {where}, {date}")
    return table


def _filled(shares: Mapping[str, float]) -> Range:
    likely = float(shares["likely"])
    return Range(float(shares.get("low", likely)), likely, float(shares.get("high", likely)))

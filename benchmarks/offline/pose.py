"""Predicted seconds of the pose training step on a GPU, without one.

`python -m benchmarks.offline.pose`. Operations and bytes are counted by formula for the paper's configuration (ViT-L,
12 decoder blocks of width 768, 256 px), over a range of efficiencies, none of which was measured with this model: a
prediction to be checked, not a result. Loading of data and communication are not in it.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from benchmarks.offline.efficiency import efficiencies
from benchmarks.offline.gpus import GPUS
from fastmum.model.config import BACKWARD, PRESETS, ModelConfig
from fastmum.tasks.pose.model import CONVOLUTIONS, RESIDUAL_BLOCKS, PoseConfig, frame_flops

SIZE, PAIRS = 256, 64  # px; pairs of a GPU: 1,024 on 16
PAIRS_TOTAL = 100 * 2_250_000  # "epochs" of the public code
# GPUs and days of the paper's runs: its text names both (supplement B).
PACES = ((16, 1.0), (32, 1.5))
FLOAT32_PEAK = {"a100": 156e12, "h200": 494.7e12}  # TF32, data sheets: the head's products
HEAD_SHARE = (0.25, 0.40, 0.55)  # of it, an estimate
# Values of 2 bytes read and written for each token and channel in the forward pass of a block, as in reconstruction's
# prediction; the decoder's has a third norm and a second attention.
ENCODER_VALUES, DECODER_VALUES = 50, 70
CLASS = {"products": "cublas", "attention": "fa2_frames_backward", "bandwidth": "elementwise"}


class Work(NamedTuple):
    """What a step does: operations of each kind, and bytes that element-wise operators move."""

    products: float
    attention: float
    head: float
    bandwidth: float


def work(config: PoseConfig, encoder: ModelConfig, pairs: int = PAIRS) -> Work:
    """A step of `pairs` pairs, without recomputation."""
    side = SIZE // config.patch_size
    P, D, E, C, frames = side * side, config.embed_dim, encoder.embed_dim, config.head_dim, 2 * pairs
    head = BACKWARD * 2 * P * (D * C + RESIDUAL_BLOCKS * CONVOLUTIONS * C * C)
    attention = BACKWARD * (config.depth * 8 * P * P * D + encoder.depth * 4 * (1 + P) ** 2 * E)
    products = frame_flops(config, (side, side), encoder, 1, True) - head - attention
    values = ENCODER_VALUES * encoder.depth * (1 + P) * E + DECODER_VALUES * config.depth * P * D
    return Work(*(frames * each for each in (products, attention, head, BACKWARD * 2 * values)))


def seconds(done: Work, gpu: str) -> tuple[float, float, float]:
    """Shortest, likely and longest seconds."""
    about = GPUS[gpu]
    rates = {"products": about.peak, "attention": about.peak, "head": FLOAT32_PEAK[gpu], "bandwidth": about.bandwidth}
    shares = {name: efficiencies(gpu)[each] for name, each in CLASS.items()} | {"head": HEAD_SHARE}
    low, likely, high = (
        sum(amount / (rates[name] * shares[name][i]) for name, amount in done._asdict().items()) for i in (2, 1, 0)
    )
    return low, likely, high


def main() -> int:
    """Print the prediction next to the paper's paces."""
    done = work(PoseConfig(), PRESETS["mum_vitl16"])
    paces = ", ".join(f"{gpus} x A100 in {days:g} d: {pace(gpus, days):.2f}" for gpus, days in PACES)
    for gpu in ("a100", "h200"):
        low, likely, high = seconds(done, gpu)
        counts = f"{done.products / 1e12:.0f} TFLOP of products, {done.attention / 1e12:.0f} of attention, "
        counts += f"{done.head / 1e12:.0f} of the head, {done.bandwidth / 1e9:.0f} GB"
        times = f"{low:.2f} to {high:.2f} s a step, likely {likely:.2f} (the paper, {paces})"
        print(f"{gpu.upper()}, {PAIRS} pairs: {counts}: {times}")
    return 0


def pace(gpus: int, days: float) -> float:
    """Seconds of a step of `PAIRS` pairs a GPU, if all pairs are trained on in these days."""
    return days * 86400 * gpus * PAIRS / PAIRS_TOTAL


if __name__ == "__main__":
    sys.exit(main())

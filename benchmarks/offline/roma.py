"""Predicted seconds of matching's training step on a GPU, without one.

`python -m benchmarks.offline.roma`. Operations and bytes are counted on tensors without data for the paper's
configuration (ViT-L, VGG19, 560 px, 8 pairs on a GPU), over a range of efficiencies, none of which was measured with
this model: a prediction to be checked, not a result. Loading of data and communication are not in it.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.offline.efficiency import Efficiency, efficiencies
from benchmarks.offline.gpus import GPUS
from benchmarks.offline.reconstruction import _Bytes
from fastmum.model.config import BACKWARD, PRESETS, ModelConfig
from fastmum.tasks.roma.decoder import COARSE
from fastmum.tasks.roma.model import RomaConfig, pair_flops
from fastmum.tasks.roma.vgg import Vgg

SIZE, PAIRS = 560, 8
PAPER_PAIRS, PAPER_GPUS, PAPER_DAYS = 3_000_000, 4, 5.0  # supplement B, whose "3 M steps" are read as pairs
CONVOLUTIONS = Efficiency(0.15, 0.30, 0.45, "estimate")  # of the bfloat16 peak, with the products of the refiners
L2 = 3.0  # bandwidth of the second-level cache over that of the memory, an estimate: local correlation reads from it
BYTES = 2  # of a value under bfloat16 autocast; element-wise operators in float32 move more


class Work(NamedTuple):
    """What a step does: operations, and bytes by kind."""

    encoder: float
    convolutions: float  # fine encoder and decoder
    elementwise: float  # bytes, with those of depthwise convolutions
    correlation: float  # bytes


def work(config: RomaConfig, encoder: ModelConfig, pairs: int = PAIRS, side: int = SIZE) -> Work:
    """A step of `pairs` pairs; the frozen encoder's forward pass only."""
    grid = side // config.patch_size
    with FakeTensorMode(), torch.no_grad():
        cnn = Vgg(config.vgg, config.vgg_layers).eval()
        decoder = config.decoder().eval()
        with _Bytes() as fine:
            maps = cnn(torch.empty(1, 3, side, side))
        maps |= {COARSE: torch.empty(1, config.encoder_dim, grid, grid)}
        with _Bytes() as coarse:
            decoder(maps, maps)
    # Each depthwise convolution reads and writes its map, and the 1x1 convolution after it, too.
    hidden = sum(2 * 2 * (config.hidden_blocks + 1) * s.inputs * (side // d) ** 2 for d, s in config.scales.items())
    moved = (2 * fine.total + coarse.total) / 4 + hidden
    windows = sum(
        (2 * s.radius + 2) ** 2 * s.projected * (side // d) ** 2 for d, s in config.scales.items() if s.radius
    )  # fmt: skip
    P, E = grid * grid, encoder.embed_dim
    encoding = 2 * encoder.depth * (24 * P * E * E + 4 * P * P * E)
    convolutions = pair_flops(config, encoder, side) - encoding
    return Work(
        pairs * encoding, pairs * convolutions, pairs * BACKWARD * BYTES * moved, pairs * 2 * BYTES * windows
    )  # fmt: skip


def seconds(done: Work, gpu: str) -> tuple[float, float, float]:
    """Shortest, likely and longest seconds."""
    about = GPUS[gpu]
    rates = about.peak, about.peak, about.bandwidth, L2 * about.bandwidth
    known = efficiencies(gpu)
    shares = known["cublas"], CONVOLUTIONS, known["elementwise"], known["elementwise"]
    low, likely, high = (
        sum(amount / (rate * share[i]) for amount, rate, share in zip(done, rates, shares, strict=True))
        for i in (2, 1, 0)
    )
    return low, likely, high


def main() -> int:
    """Print the prediction next to the paper's pace."""
    done = work(RomaConfig(), PRESETS["mum_vitl16"])
    pace = PAPER_DAYS * 86400 * PAPER_GPUS * PAIRS / PAPER_PAIRS
    for gpu in ("a100", "h200"):
        low, likely, high = seconds(done, gpu)
        counts = f"{done.encoder / 1e12:.0f} TFLOP of the encoder, {done.convolutions / 1e12:.0f} of convolutions, "
        counts += f"{done.elementwise / 1e9:.0f} GB, {done.correlation / 1e9:.0f} GB of windows"
        times = f"{low:.2f} to {high:.2f} s a step, likely {likely:.2f}"
        print(f"{gpu.upper()}, {PAIRS} pairs: {counts}: {times} (the paper, 4 x A100 in 5 d: {pace:.1f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())

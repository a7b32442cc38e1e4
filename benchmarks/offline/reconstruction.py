"""Predicted seconds of reconstruction's training step on a GPU, without one.

`python -m benchmarks.offline.reconstruction`. Operations and bytes are counted by formula for the paper's configuration
(48 frames of 512 px a GPU, supplement B), over the sampler's lengths and aspect ratios. Seconds are those of a range of
efficiencies, none of which was measured with this model: a prediction to be checked, not a result. Loading of data and
communication are not in it.

Legend: F frames, S frames of a sequence, L tokens of a frame, C width.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.offline.efficiency import Efficiency, efficiencies
from benchmarks.offline.gpus import GPUS
from fastmum.model.config import BACKWARD, PRESETS, ModelConfig
from fastmum.tasks.reconstruction.aggregator import Tap
from fastmum.tasks.reconstruction.dpt import LEVELS, Dpt
from fastmum.tasks.reconstruction.flops import dense_flops, frame_flops, square_flops
from fastmum.tasks.reconstruction.model import ReconstructionConfig

PAPER_SECONDS = 3 * 86400 / 100_000  # supplement B: 100 K steps in 3 days on 32 x H200
FRAMES, VIEWS, ASPECTS, WIDTH = 48, (2, 24), (0.33, 1.0), 512
SAMPLES = 6  # aspect ratios
TF32_PEAK = 494.7e12  # of H100 and H200, data sheet: convolutions of the float32 heads, torch's default
# Values of 2 bytes read and written for each token and channel in the forward pass of a compiled block: norms,
# LayerScale, residuals in float32, rotation, GELU of four times the width. An estimate; backward moves twice as many.
BLOCK_VALUES = 60
CONVOLUTIONS = Efficiency(0.25, 0.40, 0.55, "estimate")  # of TF32_PEAK
# Classes of the table of efficiencies: attention across and within frames is mostly of a thousand tokens and more.
CLASS = {"products": "cublas", "attention": "fa3_spans_backward", "bandwidth": "elementwise"}


class Work(NamedTuple):
    """What a step does: operations of each kind, and bytes that element-wise operators move."""

    products: float
    attention: float
    convolutions: float
    bandwidth: float


class _Bytes(TorchDispatchMode):
    """Adds up the bytes of inputs and outputs of operators that make new tensors, but for convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "convolution" not in func.name():
            leaves = tree_leaves((args, kwargs, result))
            self.total += sum(x.numel() * x.element_size() for x in leaves if isinstance(x, torch.Tensor))
        return result


def head_bytes(config: ReconstructionConfig, grid: tuple[int, int]) -> int:
    """Bytes that the dense heads' other operators move in the forward pass of a frame."""
    total = 0
    for outputs in (1, 3) if config.points else (1,):
        with torch.device("meta"), torch.no_grad():
            head = Dpt(2 * config.embed_dim, outputs, "exp", config.dpt_features, config.dpt_levels)
            tokens = torch.empty(1, grid[0] * grid[1], config.embed_dim)
            with _Bytes() as counter:
                head.maps([Tap(tokens, tokens)] * LEVELS, slice(None), grid, config.patch_size)
        total += counter.total
    return total


def work(config: ReconstructionConfig, encoder: ModelConfig, recompute: bool) -> Work:
    """The mean step of the sampler; `recompute`: the aggregator's blocks once more in the backward pass."""
    aspects = [ASPECTS[0] + (i + 0.5) / SAMPLES * (ASPECTS[1] - ASPECTS[0]) for i in range(SAMPLES)]
    numbers = range(VIEWS[0], VIEWS[1] + 1)
    totals = torch.zeros(4, dtype=torch.float64)
    passes, C = (BACKWARD + recompute) / BACKWARD, config.embed_dim
    for aspect in aspects:
        grid = int(WIDTH * aspect) // config.patch_size, WIDTH // config.patch_size
        P = grid[0] * grid[1]
        L = 1 + config.registers + P
        dense = BACKWARD * sum(dense_flops(config, grid, n) for n in ((1, 3) if config.points else (1,)))
        inside = BACKWARD * config.pairs * 4 * L * L * C
        encoding = encoder.depth * 4 * (1 + P) ** 2 * encoder.embed_dim
        products = frame_flops(config, grid, encoder, False) - dense - inside - encoding
        blocks = 2 * config.pairs * L * C * passes * BACKWARD + encoder.depth * (1 + P) * encoder.embed_dim
        moved = 2 * BLOCK_VALUES * blocks + BACKWARD * head_bytes(config, grid)
        frame = torch.tensor([products * passes, inside * passes + encoding, dense, moved], dtype=torch.float64)
        for S in numbers:
            lengths = [S] * max(1, FRAMES // S)
            totals += frame * sum(lengths) / (len(aspects) * len(numbers))
            totals[1] += square_flops(config, grid, lengths) * passes / (len(aspects) * len(numbers))
    return Work(*totals.tolist())


def seconds(done: Work, gpu: str = "h200") -> tuple[float, float, float]:
    """Shortest, likely and longest seconds."""
    about = GPUS[gpu]
    rates = {"products": about.peak, "attention": about.peak, "convolutions": TF32_PEAK, "bandwidth": about.bandwidth}
    shares = {name: efficiencies(gpu)[each] for name, each in CLASS.items()} | {"convolutions": CONVOLUTIONS}
    low, likely, high = (
        sum(amount / (rates[name] * shares[name][i]) for name, amount in done._asdict().items()) for i in (2, 1, 0)
    )
    return low, likely, high


def main() -> int:
    """Print the prediction next to the paper's pace."""
    for recompute in (True, False):
        done = work(ReconstructionConfig(), PRESETS["mum_vitl16"], recompute)
        low, likely, high = seconds(done)
        print(
            f"H200, blocks {'recomputed' if recompute else 'kept'}: {done.products / 1e12:.0f} TFLOP of products, "
            f"{done.attention / 1e12:.0f} of attention, {done.convolutions / 1e12:.0f} of convolutions, "
            f"{done.bandwidth / 1e9:.0f} GB: {low:.2f} to {high:.2f} s a step, likely {likely:.2f} "
            f"(the paper: {PAPER_SECONDS:.1f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Sizes of the benchmarks: the paper's on a GPU, smaller ones for ten minutes on two cores, tiny ones for CI."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from fastmum import PRESETS, ModelConfig
from fastmum.engine.device import pick_precision


class Sizes(NamedTuple):
    """Sizes of the benchmarks.

    Args:
        name: "paper", "laptop" or "quick".
        device: of the benchmarks.
        precision: "bf16" or "fp32", of the model's products.
        preset: of the model.
        blocks: of its encoder and its decoder; None: the preset's.
        frames, views: F of a step, S of a sequence; S divides F.
        image_size: side of a frame in pixels.
        rounds, step_rounds: of duels and of training steps.
        compiled: whether to time the compiled reference, too.
    """

    name: str
    device: torch.device
    precision: str
    preset: str
    blocks: tuple[int, int] | None
    frames: int
    views: int
    image_size: int
    rounds: int
    step_rounds: int
    compiled: bool

    @property
    def model(self) -> ModelConfig:
        """The model's configuration."""
        preset = PRESETS[self.preset]
        return replace(preset, depth=self.blocks[0], decoder_depth=self.blocks[1]) if self.blocks else preset

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def patches(self) -> int:
        """P, patches of a frame."""
        return (self.image_size // self.model.patch_size) ** 2

    @property
    def visible(self) -> int:
        """K, visible patches of a frame."""
        return self.patches // 4

    @property
    def settings(self) -> list[str]:
        """As `key.sub=value`."""
        return [
            f"model.preset={self.preset}",
            f"model.depth={self.model.depth}",
            f"model.decoder_depth={self.model.decoder_depth}",
            f"data.image_size={self.image_size}",
            f"train.precision={self.precision}",
            f"train.device={self.device}",
        ]

    def __str__(self) -> str:
        blocks = f" with {self.blocks[0]} + {self.blocks[1]} blocks" if self.blocks else ""
        return (
            f"{self.name}: {self.preset}{blocks}, {self.frames} frames of {self.image_size} px as "
            f"{self.frames // self.views} x {self.views}, {self.precision} on {self.device.type}, {self.rounds} rounds "
            f"({self.step_rounds} of steps)" + ("" if self.compiled else ", nothing compiled")
        )


def pick_sizes(quick: bool = False) -> Sizes:
    """Sizes for this machine.

    CUDA: the paper's (supplement, "Sampling": 96 frames of 256 px per GPU) in bfloat16. CPU: ViT-L if bfloat16
    is fast, else the widths of ViT-B with fewer blocks, which `torch.compile` handles in reasonable time.

    Args:
        quick: tiny sizes and two rounds, on any machine.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = pick_precision("auto", device)
    if quick:
        return Sizes("quick", device, precision, "mum_tiny", None, 4, 2, 64, 2, 2, compiled=False)
    if device.type == "cuda":
        return Sizes("paper", device, precision, "mum_vitl16", None, 96, 12, 256, 20, 20, compiled=True)
    preset, blocks = ("mum_vitl16", None) if precision == "bf16" else ("mum_vitb16", (6, 4))
    return Sizes("laptop", device, precision, preset, blocks, 8, 4, 256, 6, 4, compiled=True)

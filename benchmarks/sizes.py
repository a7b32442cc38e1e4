"""What is measured where: the paper's sizes on a GPU, sizes for ten minutes on two cores, and tiny ones for CI."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastmum import PRESETS, ModelConfig
from fastmum.training.device import pick_precision


class Sizes(NamedTuple):
    """Sizes of the benchmarks.

    Args:
        name: "paper", "laptop" or "quick".
        device: that is measured.
        precision: "bf16" or "fp32", of the model's products.
        preset: of the model.
        frames, views: F of a step, S of a sequence; S divides F.
        image_size: side of a frame in pixels.
        rounds: of every duel.
        step_rounds: of training steps.
        compiled: whether the reference is also compiled.
    """

    name: str
    device: torch.device
    precision: str
    preset: str
    frames: int
    views: int
    image_size: int
    rounds: int
    step_rounds: int
    compiled: bool

    @property
    def model(self) -> ModelConfig:
        """Widths and depths."""
        return PRESETS[self.preset]

    @property
    def dtype(self) -> torch.dtype:
        """What the model's products are computed in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def patches(self) -> int:
        """P, of a frame."""
        return (self.image_size // self.model.patch_size) ** 2

    @property
    def visible(self) -> int:
        """K, a quarter."""
        return self.patches // 4

    @property
    def settings(self) -> list[str]:
        """As `key.sub=value` words."""
        return [
            f"model.preset={self.preset}",
            f"data.image_size={self.image_size}",
            f"train.precision={self.precision}",
            f"train.device={self.device}",
        ]

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.preset}, {self.frames} frames of {self.image_size} px as "
            f"{self.frames // self.views} x {self.views}, {self.precision} on {self.device.type}, {self.rounds} rounds "
            f"({self.step_rounds} of steps)" + ("" if self.compiled else ", nothing compiled")
        )


def pick_sizes(quick: bool = False) -> Sizes:
    """The sizes for this machine.

    With CUDA those of the paper (supplement, "Sampling": 96 frames of 256 px a GPU) in bfloat16. On a CPU a model that
    its products can train in seconds: ViT-L where they are fast in bfloat16, ViT-B else.

    Args:
        quick: tiny sizes and two rounds, on any machine.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = pick_precision("auto", device)
    if quick:
        return Sizes("quick", device, precision, "mum_tiny", 4, 2, 64, 2, 2, compiled=False)
    if device.type == "cuda":
        return Sizes("paper", device, precision, "mum_vitl16", 96, 12, 256, 20, 20, compiled=True)
    preset = "mum_vitl16" if precision == "bf16" else "mum_vitb16"
    return Sizes("laptop", device, precision, preset, 8, 4, 256, 8, 4, compiled=True)

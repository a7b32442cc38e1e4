"""The learning rate: linear in the frames of a step, warm-up and half a cosine (facts of the paper's run)."""

from __future__ import annotations

import math

from fastmum.config.schema import OptimSection

BASE_FRAMES = 256  # the base learning rate is for this many frames a step


def learning_rate(step: int, steps: int, optim: OptimSection, frames_per_step: int) -> float:
    """The rate of step `step`, counted from 0: linear up to the peak over the warm-up, then half a cosine to 0.

    The peak is `base_lr` * frames_per_step / 256, with the frames of all devices together.
    """
    peak = optim.base_lr * frames_per_step / BASE_FRAMES
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))

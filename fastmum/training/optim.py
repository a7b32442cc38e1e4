"""Optimiser and learning rate: AdamW, linear scaling, warm-up and half a cosine (facts of the paper's run)."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastmum.config.schema import OptimSection

BASE_FRAMES = 256  # the base learning rate is for this many frames a step


def build_optimizer(model: nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """AdamW over two groups: matrices decay, biases, norms and other 1-D parameters do not."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True)


def learning_rate(step: int, steps: int, optim: OptimSection, frames_per_step: int) -> float:
    """The rate of step `step`, counted from 0: linear up to the peak over the warm-up, then half a cosine to 0.

    The peak is `base_lr` * frames_per_step / 256.
    """
    peak = optim.base_lr * frames_per_step / BASE_FRAMES
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))

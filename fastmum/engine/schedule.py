"""Learning-rate schedules: linear scaling with the batch, linear warm-up, then cosine, step or wsd."""

from __future__ import annotations

import math

from fastmum.config.schema import OptimSection

BASE_SAMPLES = 256  # the base learning rate is that of so many samples (frames) per step


def learning_rate(step: int, steps: int, optim: OptimSection, samples_per_step: int) -> float:
    """The learning rate of a step, counted from 0.

    Linear warm-up to the peak `base_lr` * samples_per_step / 256, then by `optim.schedule`:
    cosine: half a cosine down to `min_lr` (scaled like the peak); step: times `gamma` at each milestone; wsd: constant,
    then linear to `min_lr` over the last `decay_share` of all steps.
    """
    scale = samples_per_step / BASE_SAMPLES
    peak, least = optim.base_lr * samples_per_step / BASE_SAMPLES, optim.min_lr * scale
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    if optim.schedule == "step":
        return peak * optim.gamma ** sum(step >= milestone for milestone in optim.milestones)
    if optim.schedule == "wsd":
        decay = max(1, round(steps * optim.decay_share))
        progress = max(0.0, (step - (steps - decay)) / decay)
        return peak + (least - peak) * progress
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * progress))

"""Random masking: uniform, the same number of visible patches in every frame (paper, section 3)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_NOISE_STREAM = 1  # differs from the sampler's stream of the same seed, rank and step


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Visible patches of a frame, int(P * (1 - mask_ratio)).

    Raises:
        ValueError: no patch would be visible, or none masked.
    """
    count = int(num_patches * (1 - mask_ratio)) if 0 <= mask_ratio <= 1 else 0
    if not 0 < count < num_patches:
        raise ValueError(
            f"mask_ratio is {mask_ratio} for frames of {num_patches} patches, but must leave at least one patch "
            "visible and one masked"
        )
    return count


def split_by_noise(noise: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Split the patches of every frame into visible and masked.

    Args:
        noise: (F, P) uniform; the `visible` smallest of a row are visible, ties go to the lower patch number.
        visible: K.

    Returns:
        visible_ids (F, K) and masked_ids (F, P - K), int64, ascending in each row.
    """
    order = torch.argsort(noise, dim=1, stable=True)
    return order[:, :visible].sort(dim=1).values, order[:, visible:].sort(dim=1).values


def seeded_noise(seed: int, rank: int, step: int, num_frames: int, num_patches: int) -> Tensor:
    """The noise of a training step, (F, P) float32 on the CPU: a pure function of its arguments."""
    rng = np.random.default_rng((seed, rank, step, _NOISE_STREAM))
    return torch.from_numpy(rng.random((num_frames, num_patches), dtype=np.float32))

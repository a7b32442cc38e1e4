"""Bicubic, antialiased resizing of bytes on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate


def resize(region: np.ndarray, size: int) -> Tensor:
    """Resize a region (h, w, 3) uint8 to (size, size, 3) uint8.

    torch's kernel for bytes is vectorised: the same filter as Pillow's, whose values it meets within rounding, in a
    third to a sixth of Pillow's time. It runs in the calling thread.
    """
    pixels = torch.from_numpy(region).permute(2, 0, 1)[None]  # seen as (1, 3, h, w), channels last in memory
    return interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0)

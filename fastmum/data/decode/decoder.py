"""What every decoder does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


class Decoded(NamedTuple):
    """Frames, and which of them could not be had.

    Args:
        frames: (F, size, size, 3) uint8, RGB, dense. Whoever receives them owns them; on a GPU they are complete.
        bad: for every frame that cannot be decoded, its index and the reason; its pixels mean nothing.
    """

    frames: Tensor
    bad: dict[int, str]


class Decoder(Protocol):
    """Decodes the frames of a plan, region by region; may be called by several threads at once.

    Attributes:
        size: side of a frame in pixels.
    """

    size: int

    def decode(self, files: Sequence[Path], crops: np.ndarray, flips: np.ndarray) -> Decoded:
        """Decode, crop, resize and flip.

        Args:
            files: F image files: JPEG, PNG, WebP, and whatever else Pillow reads. Turned upright by EXIF's orientation;
                grey, palette and CMYK become RGB, alpha is dropped, 16 bits become 8.
            crops: (F, CROP_WIDTH), for `fastmum.data.crops.crop_box`.
            flips: (F,) bool, mirrored left to right.
        """
        ...

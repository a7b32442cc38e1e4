"""From an image file to a training frame: decode, crop, resize, flip."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fastmum.data.plan import Crop

BYTES_PER_PIXEL = 4  # Pillow pads RGB


class Decoder:
    """Decodes with Pillow, keeping decoded images in memory while they fit; may be shared by threads.

    Args:
        size: side of a training frame in pixels.
        cache_bytes: memory for decoded images; what does not fit is decoded anew each time.
    """

    def __init__(self, size: int, cache_bytes: int = 0) -> None:
        self.size = size
        self._room = cache_bytes
        self._cache: dict[Path, Image.Image] = {}
        self._lock = threading.Lock()

    def frame(self, file: Path, crop: Crop) -> np.ndarray:
        """One frame, (size, size, 3) uint8, RGB.

        Raises:
            OSError, ValueError, SyntaxError: a file that Pillow cannot read, as it says it.
        """
        image = self._image(file)
        side = (self.size, self.size)
        frame = np.asarray(image.resize(side, Image.Resampling.BICUBIC, box=crop.box(*image.size)))
        return frame[:, ::-1] if crop.flip else frame

    def _image(self, file: Path) -> Image.Image:
        image = self._cache.get(file)
        if image is None:
            image = read_image(file)
            with self._lock:
                size = BYTES_PER_PIXEL * image.width * image.height
                if size <= self._room and file not in self._cache:
                    self._room -= size
                    self._cache[file] = image
        return image


def read_image(file: Path) -> Image.Image:
    """A whole image as RGB, turned upright by its EXIF orientation; 16-bit grey is scaled to 8 bits.

    Raises:
        OSError, ValueError, SyntaxError: a file that Pillow cannot read, as it says it.
    """
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            upright = Image.fromarray((np.asarray(upright, dtype=np.uint32) >> 8).astype(np.uint8))
        return upright.convert("RGB")

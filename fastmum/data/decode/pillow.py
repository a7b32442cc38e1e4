"""Decoding with Pillow: needs nothing but fastmum itself, keeps decoded images in memory where they fit."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from fastmum.data.crops import crop_box
from fastmum.data.decode.decoder import Decoded
from fastmum.data.decode.geometry import Box, jpeg_scale, place, stored_box
from fastmum.data.decode.header import FrameError, Header, read_file, read_header
from fastmum.data.decode.resize import resize


class PillowDecoder:
    """Decodes in the calling threads: Pillow and torch release Python's lock while they work.

    Large JPEGs are decoded at a half, a quarter or an eighth of their size where the crop allows it. They are never
    kept in memory, since a frame must not depend on what was decoded before.

    Args:
        size: side of a frame in pixels.
        cache_bytes: memory for decoded images; what does not fit is decoded anew each time.
        pin_memory: return page-locked memory, from which copies to a GPU are asynchronous.
    """

    def __init__(self, size: int, cache_bytes: int = 0, pin_memory: bool = False) -> None:
        self.size = size
        self.pin_memory = pin_memory
        self._cache = _Cache(cache_bytes)

    def decode(self, files: Sequence[Path], crops: np.ndarray, flips: np.ndarray) -> Decoded:
        """See `Decoder.decode`."""
        frames = torch.empty(len(files), self.size, self.size, 3, dtype=torch.uint8, pin_memory=self.pin_memory)
        out, bad = frames.numpy(), {}
        for i, (file, crop, flip) in enumerate(zip(files, crops, flips.tolist(), strict=True)):
            try:
                self.decode_to(out[i], file, crop, flip)
            except FrameError as error:
                bad[i] = str(error)
        return Decoded(frames, bad)

    def decode_to(self, out: np.ndarray, file: Path, crop: np.ndarray, flip: bool) -> None:
        """Decode one frame to `out` (size, size, 3) uint8.

        Raises:
            FrameError: a file that cannot be decoded.
        """
        whole = self._cache.get(file)
        if whole is None:
            header = read_header(read_file(file))
            if self._scalable(header) or not self._cache.has_room(3 * header.width * header.height):
                self._decode_region(out, header, crop, flip)
                return
            whole = _Whole(np.array(rgb(header.image)), header.orientation, header.width, header.height)
            self._cache.put(file, whole)
        left, top, right, bottom = _stored_box(crop, whole)
        place(resize(whole.pixels[top:bottom, left:right], self.size), out, whole.orientation, flip)

    def _scalable(self, header: Header) -> bool:
        return header.image.format in ("JPEG", "MPO") and jpeg_scale(*header.image.size, self.size) > 1

    def _decode_region(self, out: np.ndarray, header: Header, crop: np.ndarray, flip: bool) -> None:
        box = _stored_box(crop, header)
        scale = jpeg_scale(box[2] - box[0], box[3] - box[1], self.size) if self._scalable(header) else 1
        if scale > 1:
            frame = self._decode_scaled(header.image, box, scale)
        else:
            frame = resize(np.array(rgb(header.image, box)), self.size)
        place(frame, out, header.orientation, flip)

    def _decode_scaled(self, image: Image.Image, box: Box, scale: int) -> np.ndarray:
        image.draft(None, (image.width // scale, image.height // scale))
        # The box now has fractions of pixels, which only Pillow's own resizing knows.
        left, top, right, bottom = (side / scale for side in box)
        outer = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
        inner = left - outer[0], top - outer[1], right - outer[0], bottom - outer[1]
        frame = rgb(image, outer).resize((self.size, self.size), Image.Resampling.BICUBIC, box=inner)
        return np.asarray(frame)


class _Whole(NamedTuple):
    """A decoded image as stored, and its upright size."""

    pixels: np.ndarray  # (h, w, 3) uint8
    orientation: int
    width: int
    height: int


def _stored_box(crop: np.ndarray, image: Header | _Whole) -> Box:
    return stored_box(crop_box(crop, image.width, image.height), image.orientation, image.width, image.height)


def rgb(image: Image.Image, box: Box | None = None) -> Image.Image:
    """Decode an image, or a box of it, as 8-bit RGB.

    Raises:
        FrameError: pixels that Pillow cannot decode.
    """
    try:
        region = image.crop(box) if box else image
        region.load()
        if region.mode.startswith("I"):  # 16 bits
            region = Image.fromarray((np.asarray(region).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
        return region if region.mode == "RGB" else region.convert("RGB")  # which would copy RGB, too
    except Exception as error:  # Pillow's readers raise whatever a malformed file leads them to
        raise FrameError(str(error) or type(error).__name__) from None


class _Cache:
    """Decoded images, up to a number of bytes; never gives one up again."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._images: dict[Path, _Whole] = {}
        self._lock = threading.Lock()

    def get(self, file: Path) -> _Whole | None:
        return self._images.get(file)

    def has_room(self, size: int) -> bool:
        return size <= self._room

    def put(self, file: Path, image: _Whole) -> None:
        with self._lock:
            if file not in self._images and self.has_room(image.pixels.nbytes):
                self._room -= image.pixels.nbytes
                self._images[file] = image

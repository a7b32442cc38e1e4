"""Decoding image files to training frames: three decoders that produce the same frames for a plan."""

import importlib.util
import logging
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmum.data.decode.image import JPEGS, Header, crop_box, jpeg_scale, place, read_header, resize, rgb, stored_box
from fastmum.data.decode.image import FrameError as FrameError  # public here
from fastmum.data.errors import DataError

log = logging.getLogger(__name__)

DECODERS = ("auto", "dali", "dali_cpu", "pillow")
INSTALL_DALI = "pip install 'fastmum[dali]'"


class Decoded(NamedTuple):
    """Decoded frames."""

    frames: Tensor  # (F, size, size, 3) uint8, RGB, contiguous, owned by the caller; complete if on a GPU
    bad: dict[int, str]  # index and reason of every frame that cannot be decoded; the pixels of these are undefined


class Decoder(Protocol):
    """Decodes frames of `size` x `size` pixels; safe to call from several threads."""

    size: int

    def decode(self, files: Sequence[Path], crops: np.ndarray, flips: np.ndarray) -> Decoded:
        """Decode, crop, resize and flip.

        Args:
            files: F image files in any format that Pillow reads. EXIF orientation is applied; grey, palette and CMYK
                become RGB, alpha is dropped, 16 bits become 8.
            crops: (F, CROP_WIDTH), for `fastmum.data.decode.image.crop_box`.
            flips: (F,) bool, mirror left to right.
        """
        ...


class PillowDecoder:
    """Decodes in the calling thread; Pillow and torch release the GIL meanwhile.

    Large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where the crop allows it. These are never cached, because
    a frame must not depend on what was decoded before. Other images stay in `cache_bytes` of memory until it is full.
    With `pin_memory` frames are in page-locked memory, for asynchronous copies to a GPU.
    """

    def __init__(self, size: int, cache_bytes: int = 0, pin_memory: bool = False) -> None:
        self.size, self.pin_memory = size, pin_memory
        self._cache: dict[Path, _Decompressed] = {}
        self._cache_room = cache_bytes
        self._lock = threading.Lock()

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
        """Decode one frame to `out` (size, size, 3) uint8; raises FrameError if it cannot be decoded."""
        image = self._cache.get(file)
        if image is None:
            header = read_header(file)
            scalable = header.image.format in JPEGS and jpeg_scale(*header.image.size, self.size) > 1
            if scalable or 3 * header.width * header.height > self._cache_room:
                place(self._decode_region(header, crop, scalable), out, header.orientation, flip)
                return
            image = _Decompressed(np.array(rgb(header)), header.orientation, header.width, header.height)
            with self._lock:
                if file not in self._cache and image.pixels.nbytes <= self._cache_room:
                    self._cache_room -= image.pixels.nbytes
                    self._cache[file] = image
        left, top, right, bottom = _box_in_file(crop, image)
        place(resize(image.pixels[top:bottom, left:right], self.size), out, image.orientation, flip)

    def _decode_region(self, header: Header, crop: np.ndarray, scalable: bool) -> np.ndarray:
        box = _box_in_file(crop, header)
        scale = jpeg_scale(box[2] - box[0], box[3] - box[1], self.size) if scalable else 1
        if scale == 1:
            return resize(np.array(rgb(header, box)), self.size)
        header.image.draft(None, (header.image.width // scale, header.image.height // scale))
        # The scaled box has fractions of pixels, which only Pillow's resize supports.
        left, top, right, bottom = (side / scale for side in box)
        outer = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
        inner = left - outer[0], top - outer[1], right - outer[0], bottom - outer[1]
        frame = rgb(header, outer).resize((self.size, self.size), Image.Resampling.BICUBIC, box=inner)
        return np.asarray(frame)


class _Decompressed(NamedTuple):
    """The pixels of a file, (h, w, 3) uint8 as stored, and the upright size."""

    pixels: np.ndarray
    orientation: int
    width: int
    height: int


def _box_in_file(crop: np.ndarray, image: Header | _Decompressed) -> tuple[int, int, int, int]:
    return stored_box(crop_box(crop, image.width, image.height), image.orientation, image.width, image.height)


def make_decoder(name: str, size: int, device: torch.device | str = "cpu", cache_bytes: int = 0) -> Decoder:
    """Create a decoder of frames of `size` x `size` pixels; DataError if it cannot run here.

    Args:
        name: `dali` (on the GPU), `dali_cpu`, `pillow`, or `auto`: dali for a CUDA device if installed, else pillow.
        device: where training runs; for a GPU, frames decoded on the CPU are page-locked.
        cache_bytes: memory for decoded images; only pillow has a cache.
    """
    device = torch.device(device)
    on_gpu, installed, where = device.type == "cuda", _has_dali(), f"data.decoder is '{name}', but"
    if name not in DECODERS:
        raise DataError(f"{where} must be one of {', '.join(DECODERS)}")
    if name == "auto" and on_gpu and not installed:
        log.warning("frames are decoded on the CPU by Pillow; for decoding on the GPU: %s", INSTALL_DALI)
    if name == "pillow" or (name == "auto" and not (on_gpu and installed)):
        return PillowDecoder(size, cache_bytes, pin_memory=on_gpu)
    if not installed:
        raise DataError(f"{where} DALI is not installed: {INSTALL_DALI}, or data.decoder=pillow")
    from fastmum.data.decode.dali import DaliCpuDecoder, DaliGpuDecoder

    if name == "dali_cpu":
        return DaliCpuDecoder(size, pin_memory=on_gpu)
    if not on_gpu:
        raise DataError(f"{where} the run is on '{device}': data.decoder=dali_cpu or pillow decode on the CPU")
    return DaliGpuDecoder(size, device)


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no NVIDIA package at all
        return False

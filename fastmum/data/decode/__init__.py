"""Decoding image files to training frames: three decoders that produce the same frames for a plan."""

from __future__ import annotations

import importlib.util
import logging

import torch

from fastmum.data.decode.image import FrameError
from fastmum.data.decode.pillow import Decoded, Decoder, PillowDecoder
from fastmum.data.errors import DataError

__all__ = ["DECODERS", "Decoded", "Decoder", "FrameError", "PillowDecoder", "make_decoder"]

log = logging.getLogger(__name__)

DECODERS = ("auto", "dali", "dali_cpu", "pillow")
INSTALL_DALI = "pip install 'fastmum[dali]'"


def make_decoder(name: str, size: int, device: torch.device | str = "cpu", cache_bytes: int = 0) -> Decoder:
    """Create a decoder.

    Args:
        name: `dali` (on the GPU), `dali_cpu`, `pillow`, or `auto`: dali for a CUDA device where it is installed, else
            pillow.
        size: side of a frame in pixels.
        device: where training runs; for a GPU, frames decoded on the CPU are page-locked.
        cache_bytes: memory for decoded images; only pillow has a cache.

    Raises:
        DataError: an unknown name, DALI is not installed, `dali` without a GPU.
    """
    device = torch.device(device)
    on_gpu, installed = device.type == "cuda", _has_dali()
    if name not in DECODERS:
        raise DataError(f"data.decoder is '{name}', but must be one of {', '.join(DECODERS)}")
    if name == "auto":
        name = "dali" if on_gpu and installed else "pillow"
        if on_gpu and not installed:
            log.warning("frames are decoded on the CPU by Pillow; for decoding on the GPU: %s", INSTALL_DALI)
    if name == "pillow":
        return PillowDecoder(size, cache_bytes, pin_memory=on_gpu)
    if not installed:
        raise DataError(f"data.decoder is '{name}', but DALI is not installed: {INSTALL_DALI}, or data.decoder=pillow")
    from fastmum.data.decode.dali import DaliCpuDecoder, DaliGpuDecoder

    if name == "dali_cpu":
        return DaliCpuDecoder(size, pin_memory=on_gpu)
    if not on_gpu:
        raise DataError(
            f"data.decoder is 'dali', which decodes on a GPU, but the run is on '{device}'; "
            "data.decoder=dali_cpu or pillow decode on the CPU"
        )
    return DaliGpuDecoder(size, device)


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no NVIDIA package at all
        return False

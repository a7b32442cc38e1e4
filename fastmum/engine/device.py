"""The device of a process, and the precision that suits it."""

from __future__ import annotations

import logging
import re

import torch

from fastmum.config import ConfigError
from fastmum.engine.distributed import LaunchInfo

log = logging.getLogger(__name__)


def pick_precision(name: str, device: torch.device) -> str:
    """What `train.precision` stands for: auto is bf16, but fp32 on CPUs whose products in bfloat16 are plain loops."""
    slow = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if name == "bf16" and slow:
        log.warning("this CPU multiplies bfloat16 in float32, which train.precision=fp32 does without rounding")
    return name if name != "auto" else "fp32" if slow else "bf16"


def pick_device(name: str, place: LaunchInfo) -> torch.device:
    """The device that `train.device` names; with several processes on a machine each has a GPU of its own.

    Args:
        name: auto, cpu, cuda or cuda:N.
        place: of the process.

    Raises:
        ConfigError: there is no such device, or not one for every process.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"train.device is '{name}', but must be auto, cpu, cuda or cuda:N")
    there = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if there else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if place.size > 1:
        if device.index is not None:
            raise ConfigError(
                f"train.device is '{name}', but with several processes each must have one of its own: cuda"
            )
        # srun may show each task its own GPU alone.
        device = torch.device("cuda", place.local_rank if there > 1 else 0)
    if (device.index or 0) >= there:
        raise ConfigError(
            f"train.device is '{name}', but torch sees {there} CUDA devices"
            + (
                f", and this is process {place.local_rank} of {place.local_size} on its machine"
                if place.size > 1
                else ""
            )
        )
    return device

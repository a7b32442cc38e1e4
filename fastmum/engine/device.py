"""The device of a process, its precision, and the dtypes that follow."""

from __future__ import annotations

import logging
import re
from contextlib import AbstractContextManager

import torch

from fastmum.config.schema import ConfigError
from fastmum.engine.distributed import LaunchInfo

log = logging.getLogger(__name__)

# dtype of the matrices that the model computes with; fp8 rounds further at each product.
MATRIX_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
REDUCE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """bfloat16 autocast, off for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")


def pick_precision(name: str, device: torch.device) -> str:
    """Resolve `train.precision`: auto is bf16, but fp32 on CPUs that multiply bfloat16 in plain loops."""
    slow = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if name == "bf16" and slow:
        log.warning("this CPU multiplies bfloat16 in float32; train.precision=fp32 is as fast and does not round")
    return name if name != "auto" else "fp32" if slow else "bf16"


def pick_device(name: str, launch: LaunchInfo | None = None, key: str = "train.device") -> torch.device:
    """The device of a name; with several processes on a machine each gets a separate GPU.

    Args:
        name: auto, cpu, cuda or cuda:N.
        launch: of the process; None: a single process.
        key: names the option in messages.

    Raises:
        ConfigError: no such device, or fewer than processes.
    """
    launch = launch or LaunchInfo()
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"{key} is '{name}', but must be auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if launch.size > 1:
        if device.index is not None:
            raise ConfigError(f"{key} is '{name}', but several processes need one GPU each: use cuda")
        # srun may show each task only its own GPU.
        device = torch.device("cuda", launch.local_rank if count > 1 else 0)
    if (device.index or 0) >= count:
        process = f", and this is process {launch.local_rank} of {launch.local_size} on its machine"
        raise ConfigError(
            f"{key} is '{name}', but torch sees {count} CUDA devices{process if launch.size > 1 else ''}"
        )
    return device

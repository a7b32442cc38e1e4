"""Matrix products of the blocks in 8-bit floating point, by torchao (`train.precision=fp8`)."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from fastmum.config import ConfigError
from fastmum.model.block import Block

CAPABILITY = (8, 9)  # CUDA compute capability whose tensor cores multiply float8: Ada, Hopper, Blackwell
MULTIPLE = 16  # of both sides of a matrix, for torch._scaled_mm
INSTALL = "pip install 'fastmum[fp8]'"


def check_fp8(device: torch.device) -> None:
    """Whether a device can train in fp8.

    Raises:
        ConfigError: it cannot, or torchao is not installed; with the reason and the remedy.
    """
    key = "train.precision is fp8, but"
    if device.type != "cuda":
        raise ConfigError(f"{key} {device.type} devices have no float8 products: take bf16 or fp32")
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"{key} {name} is sm_{found[0]}{found[1]}, and float8 products need sm_{CAPABILITY[0]}{CAPABILITY[1]} "
            "(RTX 4090, L40S, H100, H200) or later: take bf16"
        )
    if not is_there():
        raise ConfigError(f"{key} the package 'torchao' is not installed: {INSTALL}")


def is_there() -> bool:
    """Whether torchao is installed."""
    return importlib.util.find_spec("torchao") is not None


def use_fp8(model: nn.Module, emulate: bool = False) -> int:
    """Make the linear layers of all blocks multiply in float8, scaled per tensor at every step; in place.

    Embedding, norms, attention and the head stay as they are, weights keep names, shapes and dtypes.

    Args:
        model: not yet shared out, nor compiled.
        emulate: compute the same rounding where there are no such products, to test it.

    Returns:
        How many layers there are.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    blocks = {name for name, module in model.named_modules() if isinstance(module, Block)}

    def wanted(module: nn.Module, name: str) -> bool:
        inside = any(name.startswith(f"{block}.") for block in blocks)
        return inside and isinstance(module, nn.Linear) and not any(n % MULTIPLE for n in module.weight.shape)

    convert_to_float8_training(model, module_filter_fn=wanted, config=Float8LinearConfig(emulate=emulate))
    return sum("Float8" in type(module).__name__ for module in model.modules())

"""Matrix products of the blocks in 8-bit floating point, by torchao (`train.precision=fp8`)."""

import importlib.util
from collections.abc import Iterable

import torch
from torch import nn

from fastmum.config.schema import ConfigError

CAPABILITY = (8, 9)  # CUDA compute capability whose tensor cores multiply float8: Ada, Hopper, Blackwell
MULTIPLE = 16  # of both sides of a matrix, for torch._scaled_mm
INSTALL = "pip install 'fastmum[fp8]'"


def check_fp8(device: torch.device) -> None:
    """Raise ConfigError if a device cannot train in fp8, or torchao is not installed."""
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


def use_fp8(model: nn.Module, blocks: Iterable[nn.Module], emulate: bool = False) -> int:
    """Make the linear layers of blocks multiply in float8, scaled per tensor at every step; in place.

    Returns the number of converted layers of the model, which must not be sharded or compiled yet. Weights keep names,
    shapes and dtypes. `emulate` computes the same rounding without float8 hardware, for tests.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    inside = {layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)}

    def wanted(module: nn.Module, name: str) -> bool:
        return module in inside and not any(n % MULTIPLE for n in module.weight.shape)

    # The product of a weight's gradient sums over tokens, whose number may be any.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=wanted, config=config)
    return sum("Float8" in type(module).__name__ for module in model.modules())

"""The model of a run: on its device, in its precision, shared out over devices."""

from __future__ import annotations

import logging

import torch

from fastmum.attention import AttentionError, choose_backend
from fastmum.config import Config, ConfigError
from fastmum.engine.distributed import DistContext
from fastmum.engine.fp8 import check_fp8, use_fp8
from fastmum.engine.shard import broadcast_weights, shard
from fastmum.model.block import Block
from fastmum.model.mum import MuM

log = logging.getLogger(__name__)

# Of the matrices that the model computes with; fp8 rounds further at each product.
PRECISION = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
REDUCE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(config: Config, world: DistContext) -> MuM:
    """The model of a run, not yet compiled, with the same weights on all processes.

    Raises:
        ConfigError: `model.attention` or `train.precision` cannot be used there.
        DistributedError: `parallel.shard` does not fit the number of devices.
    """
    dtype, parallel = PRECISION[config.train.precision], config.parallel
    try:
        backend = choose_backend(config.model.attention, world.device, dtype)
    except AttentionError as error:
        raise ConfigError(f"model.attention: {error}") from None
    log.info("attention across frames: %s", backend.name)
    if config.train.precision == "fp8":
        check_fp8(world.device)
    model = MuM(config.model_config).to(world.device)
    model.attention, recompute = backend.name, config.model.recompute
    if recompute == "auto":
        recompute = "mlp" if world.device.type == "cuda" else "none"
    model.set_recompute(recompute)
    if config.train.precision == "fp8":
        log.info("float8 products in %d linear layers", use_fp8(model))
    broadcast_weights(model, world)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    shard(model, blocks, world, parallel.strategy, parallel.shard, dtype, REDUCE[parallel.reduce])
    return model


def matrix_dtype(config: Config, world: DistContext) -> torch.dtype:
    """In what the model holds its matrices; under FSDP they are rounded whenever they are gathered."""
    shared_out = world.size > 1 and config.parallel.strategy != "ddp"
    return torch.float32 if shared_out else PRECISION[config.train.precision]

"""State dicts: the released layout by torch.save, and safetensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmum.pretrained import Pretrained


def released_state(weights: Mapping[str, Tensor], encoder_only: bool) -> dict[str, Tensor]:
    """Weights with the dtypes of the released files: float32, but the encoder by itself has its periods in bfloat16."""
    periods = torch.bfloat16 if encoder_only else torch.float32
    return {
        name: tensor.to(periods if name == "rope_embed.periods" else torch.float32) for name, tensor in weights.items()
    }


def write_released(file: Path, source: Pretrained) -> None:
    """Write a state dict as the released checkpoints are.

    Raises:
        OSError, RuntimeError: it cannot be written.
    """
    torch.save(released_state(source.state, source.encoder_only), file)


def write_safetensors(file: Path, source: Pretrained) -> None:
    """Write float32 tensors, with what the weights cannot tell in the metadata.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    metadata = {"format": "pt", "model_config": json.dumps(dataclasses.asdict(source.config))}
    if source.step is not None:
        metadata["step"] = str(source.step)
    # The dtype of the encoder's periods says what it computes positions in.
    dtypes = {"rope_embed.periods": source.rope_dtype}
    tensors = {n: t.to(dtypes.get(n, torch.float32)).contiguous() for n, t in source.state.items()}
    save_file(tensors, file, metadata)

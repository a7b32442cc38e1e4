"""Tiny instances of the released model, and what surrounds their weights on disk."""

import json
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor


class Reference(NamedTuple):
    """A fixture of `shared/parity`: the constructor's arguments, the state dict, and what the model makes of images."""

    config: dict
    state: dict[str, Tensor]
    tensors: dict[str, Tensor]

    @property
    def norm_eps(self) -> float:
        return 1e-5 if self.config["norm_layer"] == "layernormbf16" else 1e-6

    @property
    def images(self) -> Tensor:
        return self.tensors["images"].flatten(0, 1)


@pytest.fixture(params=["reference_square", "reference_wide"])
def reference(request, shared) -> Reference:
    with safe_open(shared / "parity" / f"{request.param}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    return Reference(config, state, tensors)


@pytest.fixture
def save(tmp_path):
    """Write something by torch.save to a file whose name says nothing."""

    def write(content, name="file.bin"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write

"""A small model of the released code: its weights, inputs, outputs and gradients, from `shared/parity`."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

TOLERANCE = 1e-5  # norm of the difference over the norm, float32
SIZES = ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


class Released:
    def __init__(self, file: Path) -> None:
        with safe_open(file, "pt") as opened:
            self.config = json.loads(opened.metadata()["config"])
            self.tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dictionary)
        self.sizes = {name: self.config[name] for name in SIZES}
        self.norm_eps = 1e-5 if self.config["norm_layer"] == "layernormbf16" else 1e-6
        self.state = {name.removeprefix("state."): x for name, x in self.tensors.items() if name.startswith("state.")}
        self.images = self.tensors["images"].flatten(0, 1)

    def load_into(self, model: torch.nn.Module) -> None:
        for name, buffer in model.named_buffers():  # what we compute is what the released model stores
            assert difference(buffer, self.state[name]) < 1e-7, name
        model.load_state_dict(self.state)

    def check(self, model: torch.nn.Module, loss: Tensor) -> None:
        """The loss and every gradient, and the features."""
        assert difference(loss, self.tensors["loss"][0]) < TOLERANCE
        loss.backward()
        for name, parameter in model.named_parameters():
            assert difference(parameter.grad, self.tensors[f"grad.{name}"]) < TOLERANCE, name
        self.check_features(model)

    def check_features(self, model: torch.nn.Module) -> None:
        features = model.forward_features(self.images)
        assert difference(features["x_norm_patchtokens"], self.tensors["features.patch"]) < TOLERANCE
        assert difference(features["x_norm_clstoken"], self.tensors["features.cls"]) < TOLERANCE

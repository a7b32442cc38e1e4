"""A small model of the released code: its weights, inputs, outputs and gradients, from `shared/parity`."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
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


def released_encoder(state, images, heads, eps):
    """The released encoder in plain code: tables, q and k in bfloat16, everything else in float32."""
    bf16 = torch.bfloat16
    width = state["cls_token"].shape[2]
    rows, columns = images.shape[2] // 16, images.shape[3] // 16
    y, x = (2.0 * (torch.arange(0.5, n, dtype=bf16) / n) - 1.0 for n in (rows, columns))
    place = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)
    angles = (2 * math.pi * place[:, :, None] / state["rope_embed.periods"].to(bf16)).flatten(1).tile(2)

    def turn(x):
        x = x.to(bf16)
        cls, x = x[:, :, :1], x[:, :, 1:]
        first, second = x.chunk(2, -1)
        x = x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
        return torch.cat([cls, x], 2).float()

    def norm(x, name):
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
    for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
        at = f"blocks.{i}"
        qkv = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(turn(qkv[0]), turn(qkv[1]), qkv[2])
        x = x + linear(attended.transpose(1, 2).flatten(2), f"{at}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
    return norm(x, "norm")[:, 1:]

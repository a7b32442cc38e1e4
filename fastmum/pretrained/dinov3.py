"""Conversion between an encoder and transformers' `DINOv3ViTModel`, the same computation under other names.

DINOv3 has separate q, k and v, registers (none here) and LayerScale (1 here). Names are those of the published DINOv3
folders, which all versions of transformers with this model (4.56 on) read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmum.files import read_json
from fastmum.model.block import BASE
from fastmum.model.config import MLP_RATIO, ModelConfig
from fastmum.pretrained.layout import WeightsError

MODEL_TYPE = "dinov3_vit"
NAMES = {
    "cls_token": "embeddings.cls_token", "patch_embed.proj": "embeddings.patch_embeddings",
    "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj",
}  # fmt: skip
UNUSED = ("embeddings.mask_token", "embeddings.register_tokens")
QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
SCALED = {"attn.proj": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"}
# Required values of settings that change the computation.
FIXED = {"num_register_tokens": 0, "use_gated_mlp": False, "hidden_act": "gelu", "rope_theta": BASE}


def dinov3_config(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """Content of `config.json`; `image_size` in pixels is a default, the model takes any."""
    return {
        "architectures": ["DINOv3ViTModel"], "model_type": MODEL_TYPE, "patch_size": config.patch_size,
        "num_channels": config.in_chans, "image_size": image_size, "hidden_size": config.embed_dim,
        "intermediate_size": MLP_RATIO * config.embed_dim, "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads, "layer_norm_eps": config.norm_eps,
        **FIXED,
        **dict.fromkeys(("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"), True),
        "layerscale_value": 1.0, "drop_path_rate": 0.0, "attention_dropout": 0.0,
        **dict.fromkeys(("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"), None),
        "dtype": "float32",
    }  # fmt: skip


def to_dinov3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an encoder under the names of a `DINOv3ViTModel`, float32."""
    width = state["cls_token"].shape[2]
    out = {name: torch.zeros(1, count, width) for name, count in zip(UNUSED, (1, 0), strict=True)}
    for name, tensor in state.items():
        if name == "rope_embed.periods":
            continue  # computed from rope_theta
        name = re.sub(r"^blocks\.", "layer.", name)
        if ".attn.qkv." in name:
            for part, rows in zip(QKV, tensor.float().chunk(3), strict=True):
                out[name.replace("attn.qkv", part)] = rows.clone()
            continue
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        out[name] = tensor.float().contiguous()
        if found := re.fullmatch(r"(layer\.\d+)\.norm([12])\.weight", name):
            out[f"{found[1]}.layer_scale{found[2]}.lambda1"] = torch.ones(width)
    return out


def from_dinov3(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parameters of an encoder from those of a `DINOv3ViTModel` and the content of its `config.json`.

    LayerScale is multiplied into the layer before it; a missing key bias is 0. Also returns fields of `ModelConfig`
    that the parameters do not determine. WeightsError if the model computes something else.
    """
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise WeightsError(f"{key} is {config[key]}, but an encoder of fastmum has {value}")
    theirs = {re.sub(r"^model\.layer\.", "layer.", name): tensor for name, tensor in tensors.items()}
    state, theirs = {}, {name: tensor for name, tensor in theirs.items() if name not in UNUSED}
    scales = {name: theirs.pop(name) for name in list(theirs) if name.endswith(".lambda1")}
    for name in [name for name in theirs if f".{QKV[0]}." in name]:
        names = [name.replace(QKV[0], part) for part in QKV]
        zero = torch.zeros_like(theirs[name])
        rows = [theirs.pop(names[0]), theirs.pop(names[1], zero), theirs.pop(names[2])]
        state[_ours(name.replace(QKV[0], "attn.qkv"))] = torch.cat(rows)
    for name, tensor in theirs.items():
        name = _ours(name)
        for layer, scale in SCALED.items():
            if f".{layer}." in name:
                factor = scales[f"layer.{name.split('.')[1]}.{scale}"]
                tensor = tensor * (factor[:, None] if tensor.ndim == 2 else factor)
        state[name] = tensor
    return state, {"num_heads": config["num_attention_heads"], "norm_eps": config["layer_norm_eps"]}


def _ours(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(theirs, ours)
    return re.sub(r"^layer\.", "blocks.", name)


def is_dinov3(folder: Path) -> bool:
    """Whether a folder of transformers holds this kind of model."""
    try:
        return read_json(folder / "config.json").get("model_type") == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False

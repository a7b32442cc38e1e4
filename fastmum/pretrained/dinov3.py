"""DINOv3: reading facebookresearch/dinov3's files, timm's and transformers' `DINOv3ViTModel`, and writing the last.

Besides names they differ in the biases of q, k and v: a mask in the released files, absent ones elsewhere. Written
names are those of the published folders, which all versions of transformers with this model (4.56 on) read; MuM's
encoder is a DINOv3 without registers and with LayerScale 1.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmum.model.block import BASE
from fastmum.model.config import MLP_RATIO, ModelConfig
from fastmum.pretrained.layout import NORMALISATIONS, Found, State, WeightsError, rename

MODEL_TYPE = "dinov3_vit"
NAMES = {
    "cls_token": "embeddings.cls_token", "patch_embed.proj": "embeddings.patch_embeddings",
    "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj",
}  # fmt: skip
UNUSED = ("embeddings.mask_token", "embeddings.register_tokens")
QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
# Names of the released files, of transformers and of timm; transformers in memory has model.layer.
OURS = {
    r"^storage_tokens$|^embeddings\.register_tokens$|^reg_token$": "register_tokens",
    r"^embeddings\.patch_embeddings\.": "patch_embed.proj.", r"^embeddings\.": "", r"^(model\.)?layer\.": "blocks.",
    r"\.attention\.([qkv])_proj\.": r".attn.\1.", r"\.attention\.o_proj\.": ".attn.proj.",
    r"\.attn\.([qkv])_bias$": r".attn.\1.bias", r"\.mlp\.up_proj\.": ".mlp.fc1.", r"\.mlp\.down_proj\.": ".mlp.fc2.",
    r"\.(ls1\.gamma|layer_scale1\.lambda1|gamma_1)$": ".attn.proj.scale",
    r"\.(ls2\.gamma|layer_scale2\.lambda1|gamma_2)$": ".mlp.fc2.scale",
}  # fmt: skip
EPS = 1e-5  # "layernormbf16" of DINOv3's models/vision_transformer.py, which the hub's models have
HEAD_WIDTH = 64  # of S, B and L
# Required values of settings that change the computation.
FIXED = {"use_gated_mlp": False, "hidden_act": "gelu", "rope_theta": BASE}


def dinov3_config(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """Content of `config.json`; `image_size` in pixels is a default, the model takes any."""
    return {
        "architectures": ["DINOv3ViTModel"], "model_type": MODEL_TYPE, "patch_size": config.patch_size,
        "num_channels": config.in_chans, "image_size": image_size, "hidden_size": config.embed_dim,
        "intermediate_size": MLP_RATIO * config.embed_dim, "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads, "layer_norm_eps": config.norm_eps,
        "num_register_tokens": 0, **FIXED,
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


def from_dinov3(tensors: Mapping[str, Tensor], config: Mapping[str, Any], given: Mapping[str, Any]) -> Found:
    """An encoder from the tensors of a file of any of the three layouts.

    `config` is the content of config.json of a folder, else empty. WeightsError if the model computes something else.
    """
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise WeightsError(f"{key} is {config[key]}, but an encoder of fastmum has {value}")
    options: dict[str, Any] = {}
    if any(name.startswith("local_cls_norm.") for name in tensors):  # training only, in the files of SAT-493M
        options |= dict(zip(("mean", "std"), NORMALISATIONS["sat493m"], strict=True))
    state = {n: x for n, x in rename(tensors, OURS).items() if not re.fullmatch(r"mask_token|local_cls_norm\..*", n)}
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    if config.get("num_register_tokens", registers) != registers:
        raise WeightsError(f"num_register_tokens is {config['num_register_tokens']}, but there are {registers}")
    if registers:
        options["registers"] = registers
    else:
        state.pop("register_tokens", None)
    for name in [name for name in state if name.endswith("attn.q.weight")]:
        parts = [state.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        state[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    if any(re.fullmatch(r"storage_tokens|blocks\.\d+\.ls1\.gamma", name) for name in tensors):
        if "rope_embed.periods" not in state:
            raise WeightsError("rope_embed.periods is missing")
    else:
        _complete_biases(state)
    masks = [tensor for name, tensor in state.items() if name.endswith("bias_mask")]
    if not all(mask.isfinite().all() for mask in masks):
        raise WeightsError("attn.qkv.bias_mask has values that are not finite: it was never initialised")
    if "rope_embed.periods" in state:  # rounded to bfloat16 in the released files, whose code computes in float32
        state["rope_embed.periods"] = state["rope_embed.periods"].float()
    options |= {"layer_scale": any(name.endswith("attn.proj.scale") for name in state), "masked_bias": bool(masks)}
    sizes = {"norm_eps": config.get("layer_norm_eps", EPS)}
    heads = config.get("num_attention_heads", config.get("model_args", {}).get("num_heads"))
    if heads is None and "rope_embed.periods" not in state:
        heads = max(1, state["norm.weight"].shape[-1] // HEAD_WIDTH)
    return Found(state, sizes | ({} if heads is None else {"num_heads": heads}), options)


def _complete_biases(state: State) -> None:
    """Join the biases of q, k and v where blocks have them apart or not at all, and mask those that are absent."""
    absent = set()
    for name in [name for name in state if name.endswith("attn.qkv.weight") and f"{name[:-6]}bias" not in state]:
        weight, whole, part = state[name], f"{name[:-6]}bias", name.replace("qkv.weight", "{}.bias")
        found = [state.pop(part.format(each), None) for each in "qkv"]
        absent.add(tuple(bias is None for bias in found))
        zero = weight.new_zeros(len(weight) // 3)
        state[whole] = torch.cat([zero if bias is None else bias for bias in found])
        if any(bias is None for bias in found):
            state[f"{whole}_mask"] = torch.cat([zero if bias is None else zero + 1 for bias in found])
    if len(absent) > 1:
        raise WeightsError("some blocks have biases of q, k or v that others have not")

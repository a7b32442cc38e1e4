"""MAE: facebookresearch/mae's files, timm's, and transformers' `ViTMAEModel`; all the same computation.

A plain ViT with a learnt table of positions and no rotary ones. timm's ViTs and DINO's have the same names.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmum.pretrained.layout import Found, WeightsError, rename

EPS = 1e-6  # of MAE's models_mae.py and timm's `VisionTransformer`
HEAD_WIDTH = 64  # of ViT-B and ViT-L
HEADS = {1280: 16}  # of ViT-H/14, by width
DROPPED = r"mask_token|decoder_.*|decoder\..*|head\..*"
TRANSFORMERS = {
    r"^vit\.": "", r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.position_embeddings$": "pos_embed", r"^embeddings\.": "", r"^encoder\.layer\.": "blocks.",
    r"attention\.output\.dense\.": "attn.proj.", r"attention\.attention\.": "attn.",
    r"intermediate\.dense\.": "mlp.fc1.", r"output\.dense\.": "mlp.fc2.", r"layernorm_before\.": "norm1.",
    r"layernorm_after\.": "norm2.", r"^layernorm\.": "norm.",
}  # fmt: skip


def from_mae(tensors: Mapping[str, Tensor], config: Mapping[str, Any], given: Mapping[str, Any]) -> Found:
    """An encoder from the tensors of a file; `config` is the content of config.json of a folder, else empty."""
    # The classifier of MAE's finetuned files comes with fc_norm, which is refused; timm's ViTs keep `norm`.
    state = {name: x for name, x in rename(tensors, TRANSFORMERS).items() if not re.fullmatch(DROPPED, name)}
    for name in [name for name in state if ".attn.query." in name]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("query", "qkv")] = torch.cat(parts)
    shape = list(state["pos_embed"].shape)
    patches = shape[1] - 1 if len(shape) == 3 else 0
    side = math.isqrt(max(0, patches))
    if not patches or side * side != patches:
        raise WeightsError(f"pos_embed has the shape {shape}, but must be that of CLS and a square of patches")
    width = shape[2]
    heads = config.get("num_attention_heads", HEADS.get(width, max(1, width // HEAD_WIDTH)))
    sizes = {"num_heads": heads, "norm_eps": config.get("layer_norm_eps", EPS)}
    return Found(state, sizes, {"coordinates": "none", "table": (side, side)})

"""CroCo v2's encoder, and that of DUSt3R, MASt3R and Reloc3r: no CLS, rotary positions of whole rows and columns."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmum.model.block import BASE, rope_periods
from fastmum.pretrained.layout import NORMALISATIONS, Found, WeightsError, rename

EPS = 1e-6  # of croco's models/croco.py
HEAD_WIDTH = 64  # of ViT-B and ViT-L, where the file does not state the heads
NAMES = {r"^enc_blocks\.": "blocks.", r"^enc_norm\.": "norm."}
DROPPED = r"(decoder_embed|dec_blocks2?|dec_norm|prediction_head|downstream_head\d*|pose_head)\..*|mask_token"
HALF = r"(dec_blocks2|downstream_head\d*|pose_head)\..*"  # of models whose images are (x - .5) / .5


def from_croco(tensors: Mapping[str, Tensor], config: Mapping[str, Any], given: Mapping[str, Any]) -> Found:
    """An encoder from the tensors of a file; `config` are its `croco_kwargs`, else empty."""
    state = rename({name: x for name, x in tensors.items() if not re.fullmatch(DROPPED, name)}, NAMES)
    positions = str(config.get("pos_embed", f"RoPE{BASE:g}"))
    if (found := re.fullmatch(r"RoPE(\d+(?:\.\d+)?)", positions)) is None:
        raise WeightsError(f"pos_embed is '{positions}', but only rotary positions (CroCo v2) are supported")
    width = state["norm.weight"].shape[-1]
    heads = given.get("num_heads", config.get("enc_num_heads", max(1, width // HEAD_WIDTH)))
    state["rope_embed.periods"] = rope_periods(width // heads, float(found[1]))
    for name in [name for name in state if ".attn.qkv." in name]:
        state[name] = reorder(state[name], heads)
    options: dict[str, Any] = {"cls": False, "coordinates": "whole"}
    if any(re.fullmatch(HALF, name) for name in tensors):
        options |= dict(zip(("mean", "std"), NORMALISATIONS["half"], strict=True))
    return Found(state, {"num_heads": heads, "norm_eps": EPS}, options)


def reorder(rows: Tensor, heads: int) -> Tensor:
    """Rows of qkv (3 * D, ...) from CroCo's order to fastmum's, or back.

    CroCo turns the first half of a head by the row, the second by the column, each channel with the next quarter's;
    fastmum turns a channel with the next half's, rows in the first quarter: quarters 2 and 3 of q and k change places.
    """
    q_k, v = rows.split([2 * len(rows) // 3, len(rows) // 3])
    quarters = q_k.unflatten(0, (2 * heads, 4, -1))
    return torch.cat([quarters[:, [0, 2, 1, 3]].flatten(0, 2), v])

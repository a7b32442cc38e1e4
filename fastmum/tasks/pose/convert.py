"""Reloc3r's public layout of decoder and head: sizes from a state dict, and weights from and to ours."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmum.pretrained.croco import reorder
from fastmum.tasks.pose.model import CONVOLUTIONS, RESIDUAL_BLOCKS, PoseConfig
from fastmum.tasks.trained import LayoutError

HEAD_WIDTH = 64  # of Reloc3r's decoder; shapes do not show it
NAMES = {  # ours: public
    "decoder.embed": "decoder_embed", "decoder.norm": "dec_norm", "head.proj": "pose_head.proj",
    "head.fc1": "pose_head.more_mlps.0", "head.fc2": "pose_head.more_mlps.2", "head.translation": "pose_head.fc_t",
    "head.rotation": "pose_head.fc_rot",
} | {
    f"head.residual.{i}.{j}": f"pose_head.res_conv.{i}.res_conv{j + 1}"
    for i in range(RESIDUAL_BLOCKS) for j in range(CONVOLUTIONS)
}  # fmt: skip
IN_BLOCK = "norm1", "norm2", "norm3", "norm_y", "attn.proj", "cross_attn.proj", "mlp.fc1", "mlp.fc2"
ENDS = "weight", "bias"


def config_of(state: Mapping[str, Tensor], num_heads: int | None = None) -> PoseConfig:
    """The sizes of a public state dict; LayoutError names what is missing."""
    try:
        dim, encoder_dim = state["decoder_embed.weight"].shape
        head_dim = len(state["pose_head.proj.weight"])
    except KeyError as error:
        raise LayoutError(f"the weights have no {error}, so they are not Reloc3r's") from None
    depth = sum(name.startswith("dec_blocks.") and name.endswith(".norm_y.bias") for name in state)
    patch = round((head_dim / 4) ** 0.5)
    return PoseConfig(encoder_dim, patch, dim, depth, num_heads or max(1, dim // HEAD_WIDTH), head_dim)


def from_public(state: Mapping[str, Tensor], config: PoseConfig) -> dict[str, Tensor]:
    """Decoder and head of a public state dict under our names; other weights (the encoder's) are left out.

    The rows of q and k are reordered, see `fastmum.pretrained.croco.reorder`. LayoutError: a weight is missing.
    """
    ours = {}
    try:
        for end in ENDS:
            for name, public in NAMES.items():
                value = state[f"{public}.{end}"]
                ours[f"{name}.{end}"] = value.flatten(1) if value.ndim > 1 else value
            for i in range(config.depth):
                public, own = f"dec_blocks.{i}", f"decoder.blocks.{i}"
                for name in IN_BLOCK:
                    ours[f"{own}.{name}.{end}"] = state[f"{public}.{name}.{end}"]
                ours[f"{own}.attn.qkv.{end}"] = reorder(state[f"{public}.attn.qkv.{end}"], config.num_heads)
                parts = [state[f"{public}.cross_attn.proj{part}.{end}"] for part in "qkv"]
                q, k, v = reorder(torch.cat(parts), config.num_heads).chunk(3)
                ours[f"{own}.cross_attn.q.{end}"], ours[f"{own}.cross_attn.kv.{end}"] = q, torch.cat([k, v])
    except KeyError as error:
        raise LayoutError(f"the weights have no {error}, so they are not Reloc3r's") from None
    return ours


def to_public(state: Mapping[str, Tensor], config: PoseConfig) -> dict[str, Tensor]:
    """The state dict, or gradients, of our decoder and head in the public layout."""
    found = {}
    for end in ENDS:
        for name, public in NAMES.items():
            value = state[f"{name}.{end}"]
            found[f"{public}.{end}"] = value[:, :, None, None] if "residual" in name and value.ndim > 1 else value
        for i in range(config.depth):
            public, own = f"dec_blocks.{i}", f"decoder.blocks.{i}"
            for name in IN_BLOCK:
                found[f"{public}.{name}.{end}"] = state[f"{own}.{name}.{end}"]
            found[f"{public}.attn.qkv.{end}"] = reorder(state[f"{own}.attn.qkv.{end}"], config.num_heads)
            packed = torch.cat([state[f"{own}.cross_attn.{part}.{end}"] for part in ("q", "kv")])
            for part, value in zip("qkv", reorder(packed, config.num_heads).chunk(3), strict=True):
                found[f"{public}.cross_attn.proj{part}.{end}"] = value
    return found

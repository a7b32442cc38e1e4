"""Reloc3r's public layout of decoder and head: sizes from a state dict, and weights from and to ours."""

from collections.abc import Iterator, Mapping, Sequence

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

    LayoutError: a weight is missing.
    """
    ours = dict[str, Tensor]()
    try:
        for names, publics, attends in _names(config):
            value = torch.cat([state[public] for public in publics])
            value = reorder(value, config.num_heads) if attends else value.flatten(1) if value.ndim > 2 else value
            ours |= _split(value, names)
    except KeyError as error:
        raise LayoutError(f"the weights have no {error}, so they are not Reloc3r's") from None
    return ours


def to_public(state: Mapping[str, Tensor], config: PoseConfig) -> dict[str, Tensor]:
    """The state dict, or gradients, of our decoder and head in the public layout."""
    found = dict[str, Tensor]()
    for names, publics, attends in _names(config):
        value = torch.cat([state[name] for name in names])
        value = reorder(value, config.num_heads) if attends else value
        found |= _split(value[:, :, None, None] if "residual" in names[0] and value.ndim > 1 else value, publics)
    return found


def _names(config: PoseConfig) -> Iterator[tuple[list[str], list[str], bool]]:
    """Our names of some weights, the public names of the same rows, and whether they are q, k and v.

    Rows of q and k are reordered, see `fastmum.pretrained.croco.reorder`, which is its own inverse.
    """
    for end in ENDS:
        for name, public in NAMES.items():
            yield [f"{name}.{end}"], [f"{public}.{end}"], False
        for i in range(config.depth):
            public, own = f"dec_blocks.{i}", f"decoder.blocks.{i}"
            for name in (*IN_BLOCK, "attn.qkv"):
                yield [f"{own}.{name}.{end}"], [f"{public}.{name}.{end}"], name == "attn.qkv"
            ours = [f"{own}.cross_attn.{part}.{end}" for part in ("q", "kv")]
            yield ours, [f"{public}.cross_attn.proj{part}.{end}" for part in "qkv"], True


def _split(value: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Rows of q, k and v under their names, two of which are q, and k with v."""
    third = len(value) // 3
    sizes = {1: [len(value)], 2: [third, 2 * third], 3: [third] * 3}[len(names)]
    return dict(zip(names, value.split(sizes), strict=True))

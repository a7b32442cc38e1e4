"""VGGT's public layout of weights: sizes from a state dict, and names from and to ours.

Names agree, but for three things: the public file holds the encoder as `aggregator.patch_embed.*`, a register token
without registers, and a head of point tracks, which is left out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmum.tasks.reconstruction.model import ReconstructionConfig
from fastmum.tasks.trained import LayoutError

ENCODER = "aggregator.patch_embed."
LEFT_OUT = ("track_head.",)
VGGT_TAPS = {24: (4, 11, 17, 23)}  # pairs of VGGT-1B
CAMERA_HEADS, CAMERA_ITERATIONS = 16, 4  # shapes do not show them; VGGT has no others


def config_of(state: Mapping[str, Tensor], patch_size: int | None = None, **given: Any) -> ReconstructionConfig:
    """The sizes of a public state dict; LayoutError names what is missing or does not fit.

    Args:
        patch_size: needed if the encoder is absent, as in MuM's files; 16 then.
        given: other sizes than VGGT's of those that the shapes do not show: `taps`, `camera_heads`,
            `camera_iterations`.
    """
    try:
        width = state["aggregator.camera_token"].shape[-1]
        head_width = len(state["aggregator.frame_blocks.0.attn.q_norm.weight"])
        projection = state.get("aggregator.proj.weight")
        embedding = state.get(f"{ENCODER}patch_embed.proj.weight")
        levels = tuple(len(state[f"depth_head.projects.{i}.weight"]) for i in range(4))
        features = len(state["depth_head.scratch.layer1_rn.weight"])
        registers = state["aggregator.register_token"].shape[2] if "aggregator.register_token" in state else 0
    except KeyError as error:
        raise LayoutError(
            f"the weights have no {error}, so they are not VGGT's: a public checkpoint is needed"
        ) from None
    pairs = _count(state, "aggregator.frame_blocks.")
    unseen: dict[str, Any] = {
        "taps": VGGT_TAPS.get(pairs) or tuple(max(0, i) for i in range(pairs - 4, pairs)),
        "camera_heads": CAMERA_HEADS, "camera_iterations": CAMERA_ITERATIONS,
    }  # fmt: skip
    try:
        return ReconstructionConfig(
            encoder_dim=width if projection is None else projection.shape[1], embed_dim=width, pairs=pairs,
            num_heads=width // head_width, registers=registers,
            patch_size=patch_size or (16 if embedding is None else embedding.shape[-1]),
            points=any(name.startswith("point_head.") for name in state), dpt_features=features, dpt_levels=levels,
            camera_blocks=_count(state, "camera_head.trunk."), **unseen | given,
        )  # fmt: skip
    except ValueError as error:
        raise LayoutError(f"the sizes of the weights are not VGGT's: {error}") from None


def from_public(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a public state dict into that of our model without its encoder, and the encoder's under its own names."""
    ours, encoder = {}, {}
    for name, value in state.items():
        if name.startswith(ENCODER):
            encoder[name.removeprefix(ENCODER)] = value
        elif not name.startswith(LEFT_OUT) and value.numel():
            ours[name] = value
    return ours, encoder


def to_public(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of our model in the public layout, without the encoder."""
    public = {name: value for name, value in state.items() if not name.startswith("encoder.")}
    camera = public["aggregator.camera_token"]
    public.setdefault("aggregator.register_token", torch.empty(1, 2, 0, camera.shape[-1], dtype=camera.dtype))
    return public


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks under a prefix."""
    return 1 + max(
        (int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)), default=-1
    )

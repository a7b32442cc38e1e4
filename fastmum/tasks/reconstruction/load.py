"""Trained reconstruction models with their encoders: of a run, or VGGT's public checkpoint (VGGT-1B)."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmum.engine.checkpoint.manifest import CheckpointManifest
from fastmum.errors import first_line
from fastmum.files import expand_user
from fastmum.model.block import AxialRope
from fastmum.model.config import ModelConfig
from fastmum.model.encoder import Encoder
from fastmum.model.options import EncoderOptions
from fastmum.pretrained.files import read_file
from fastmum.pretrained.layout import find_state, rename, sizes_by_shape
from fastmum.pretrained.public import fold
from fastmum.tasks.reconstruction.config import ReconstructionSection
from fastmum.tasks.reconstruction.convert import config_of, from_public
from fastmum.tasks.reconstruction.model import Reconstruction
from fastmum.tasks.trained import LayoutError, fill, read_encoder, read_settings

TASKS = "reconstruction", "distillation"
DINOV2_EPS = 1e-6  # of facebookresearch/dinov2's norms
DINOV2_HEAD = 64  # width of a head of its ViT-S, B and L
DINOV2_NAMES = {r"\.ls1\.gamma$": ".attn.proj.scale", r"\.ls2\.gamma$": ".mlp.fc2.scale"}


def load_reconstruction(spec: str | os.PathLike[str]) -> Reconstruction:
    """A frozen model in eval mode on the CPU, of a run of reconstruction, or a file or folder in VGGT's public layout.

    Errors as of `read_run`.
    """
    path = expand_user(spec)
    public = path / "model.safetensors"  # of a folder as the Hugging Face hub has it
    model = _of_public(public) if public.is_file() else read_run(path)[0] if path.is_dir() else _of_public(path)
    return model.eval().requires_grad_(False)


def read_run(path: Path, encoder: str | None = None) -> tuple[Reconstruction, CheckpointManifest]:
    """The model of a run, a folder of checkpoints or a checkpoint, and the checkpoint's manifest.

    Moving averages are used if there are any. A frozen encoder, which checkpoints lack, is loaded from `encoder` or the
    run's `model.encoder`. Of a finetuned one that gives the architecture, and the checkpoint the weights.
    WeightsError, CheckpointError or LayoutError: no such run, one of another task, or another encoder than the run's.
    """
    manifest, tensors, settings = read_settings(path, TASKS, ReconstructionSection)
    loaded = read_encoder(path, manifest, settings, encoder)
    model = Reconstruction(settings.sizes(loaded.embed_dim, loaded.config.patch_size), loaded)
    return fill(model, tensors, manifest.path), manifest


def _of_public(path: Path) -> Reconstruction:
    saved = read_file(path)
    state = find_state(saved.path, saved.tree, None, ("aggregator.camera_token",), "a VGGT")
    config = config_of(state)
    ours, public = from_public(state)
    if not public:
        raise LayoutError(f"'{path}' has no encoder (aggregator.patch_embed.*)")
    encoder = dinov2_encoder(public, path)
    ours |= {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    return fill(Reconstruction(config, encoder), ours, path)


def dinov2_encoder(tensors: Mapping[str, Tensor], path: Path) -> Encoder:
    """DINOv2 with registers as VGGT has it; `path` is for messages.

    CLS has an entry in the table of positions, registers have none. The table is resized bicubically with antialiasing
    to the size of the grid (`interpolate_antialias=True`, `interpolate_offset=0.0` in VGGT's aggregator).
    """
    state = {name: x for name, x in rename(tensors, DINOV2_NAMES).items() if name != "mask_token"}
    try:
        side, width = math.isqrt(state["pos_embed"].shape[1] - 1), state["norm.weight"].shape[0]
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        scaled = any(re.fullmatch(r"blocks\.\d+\.attn\.proj\.scale", name) for name in state)
        options = EncoderOptions(
            registers=registers, coordinates="none", table=(side, side), resize="antialias", layer_scale=scaled
        )
        given: dict[str, Any] = {"num_heads": max(1, width // DINOV2_HEAD), "norm_eps": DINOV2_EPS}
        config = ModelConfig(**sizes_by_shape(state) | given)
        state, options = fold(state, options, trainable=False)
        rope = AxialRope(width // config.num_heads, "none")
        rope.init_weights()
        encoder = Encoder(config, options)
        encoder.load_state_dict(state | {"rope_embed.periods": rope.periods})
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise LayoutError(f"the encoder in '{path}' is not DINOv2's ViT-S, B or L ({what})") from None
    return encoder

"""Hugging Face transformers: the encoder as a `DINOv3ViTModel` without registers whose LayerScale is 1.

The files are written without transformers. Names are those of the published DINOv3 folders, which all of its versions
with this model (4.56 on) read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmum.export.quiet import quiet
from fastmum.model.config import MLP_RATIO, ModelConfig
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastmum.model.rope import BASE
from fastmum.pretrained import Pretrained

IMAGE_SIZE = 256  # of the paper's pretraining; supplement, "Sampling"
BICUBIC = 3  # Pillow's number
NAMES = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}
QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")


def dinov3_config(config: ModelConfig) -> dict[str, Any]:
    """Content of `config.json`."""
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "image_size": IMAGE_SIZE,
        "hidden_size": config.embed_dim,
        "intermediate_size": MLP_RATIO * config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "rope_theta": BASE,
        "query_bias": True,
        "key_bias": True,
        "value_bias": True,
        "proj_bias": True,
        "mlp_bias": True,
        "use_gated_mlp": False,
        "num_register_tokens": 0,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "attention_dropout": 0.0,
        "pos_embed_shift": None,
        "pos_embed_jitter": None,
        "pos_embed_rescale": None,
        "dtype": "float32",
    }


def preprocessor_config() -> dict[str, Any]:
    """Content of `preprocessor_config.json`: a square of the paper's size, bicubic, ImageNet's mean and deviation."""
    return {
        # DINOv3's own needs torchvision.
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def dinov3_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights under the names of a `DINOv3ViTModel`; q, k and v apart."""
    return dict(_renamed(state))


def _renamed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    width = state["cls_token"].shape[2]
    # It has both, but uses none of either here.
    yield "embeddings.mask_token", torch.zeros(1, 1, width)
    yield "embeddings.register_tokens", torch.zeros(1, 0, width)
    for name, tensor in state.items():
        if name == "rope_embed.periods":
            continue  # computed from rope_theta
        name = re.sub(r"^blocks\.", "layer.", name)
        if ".attn.qkv." in name:
            for part, rows in zip(QKV, tensor.float().chunk(3), strict=True):
                yield name.replace("attn.qkv", part), rows.clone()
            continue
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        yield name, tensor.float().contiguous()
        if found := re.fullmatch(r"(layer\.\d+)\.norm([12])\.weight", name):
            yield f"{found[1]}.layer_scale{found[2]}.lambda1", torch.ones(width)


def write_dinov3(folder: Path, source: Pretrained) -> None:
    """Write a folder for `from_pretrained`: weights, sizes, and how images are prepared.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    folder.mkdir(parents=True)
    save_file(dinov3_state(source.state), folder / "model.safetensors", {"format": "pt"})
    for name, content in (
        ("config.json", dinov3_config(source.config)),
        ("preprocessor_config.json", preprocessor_config()),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def dinov3_features(folder: Path, images: Tensor) -> tuple[str, Tensor] | None:
    """Patch tokens of normalised images by transformers, and its version; None where it is not installed."""
    try:
        with quiet():
            import transformers
            from transformers import DINOv3ViTModel
    except ImportError:
        return None
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = DINOv3ViTModel.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if bar:
            transformers.utils.logging.enable_progress_bar()
    with torch.inference_mode():
        return f"transformers {transformers.__version__}", model(images).last_hidden_state[:, 1:]

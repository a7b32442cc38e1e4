"""Hugging Face transformers: the encoder as a folder for `DINOv3ViTModel.from_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastmum.pretrained import Pretrained
from fastmum.pretrained.dinov3 import dinov3_config, to_dinov3

IMAGE_SIZE = 256  # of the paper's pretraining; supplement, "Sampling"
# Bicubic (3); DINOv3's own processor needs torchvision.
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 3,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD),
}  # fmt: skip


def write_dinov3(folder: Path, source: Pretrained) -> None:
    """Write a folder for `from_pretrained`: weights, sizes, and how images are prepared."""
    folder.mkdir(parents=True)
    save_file(to_dinov3(source.state), folder / "model.safetensors", {"format": "pt"})
    config = dinov3_config(source.config, IMAGE_SIZE)
    for name, content in (("config.json", config), ("preprocessor_config.json", PREPROCESSOR)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def dinov3_features(folder: Path, images: Tensor) -> tuple[str, Tensor] | None:
    """The version of transformers and its patch tokens of normalised images; None if it is not installed."""
    try:
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

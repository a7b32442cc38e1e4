"""Hugging Face transformers: the encoder as a folder for `DINOv3ViTModel.from_pretrained`.

Its files are written without transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmum.export.quiet import quiet
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastmum.pretrained import Pretrained
from fastmum.pretrained.dinov3 import dinov3_config, to_dinov3

IMAGE_SIZE = 256  # of the paper's pretraining; supplement, "Sampling"
BICUBIC = 3  # Pillow's number


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


def write_dinov3(folder: Path, source: Pretrained) -> None:
    """Write a folder for `from_pretrained`: weights, sizes, and how images are prepared.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    folder.mkdir(parents=True)
    save_file(to_dinov3(source.state), folder / "model.safetensors", {"format": "pt"})
    for name, content in (
        ("config.json", dinov3_config(source.config, IMAGE_SIZE)),
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

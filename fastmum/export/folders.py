"""Folders for other packages' loaders: weights, sizes, how images are prepared, and a model card."""

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastmum.engine.rundir import RunDir, read_metrics
from fastmum.model.block import BASE
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastmum.pretrained import Pretrained
from fastmum.pretrained.dinov3 import dinov3_config, to_dinov3
from fastmum.pretrained.files import run_folder, run_settings

log = logging.getLogger(__name__)

IMAGE_SIZE = 256  # of the paper's pretraining, where the run's is unknown; supplement, "Sampling"
TIMM_EPS = 1e-5  # of the norms in timm's DINOv3 models
SHOWN = ("loss", "held_out_loss", "held_out_loss_ema")  # metrics of the model card
CARD = """---
library_name: {package}
pipeline_tag: image-feature-extraction
license: {license}
tags:
- mum
- masked-image-modeling
---

# {title}

The encoder of a multi-view masked autoencoder, pretrained with fastmum by the method of
[MuM](https://arxiv.org/abs/2511.17309): a vision transformer with {sizes}.

| | |
|---|---|
{rows}

Images are RGB, resized to {size} x {size} pixels (bicubic) or to other multiples of {patch}, and normalised with
ImageNet's mean and standard deviation.

Licence of the weights: {terms}.
"""


def write_hf(folder: Path, source: Pretrained) -> None:
    """Write a folder for `from_pretrained` of transformers, without its model card."""
    size = source.image_size or IMAGE_SIZE
    processor = {  # bicubic (3); DINOv3's own processor needs torchvision
        "image_processor_type": "ViTImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
        "size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD),
    }  # fmt: skip
    config = dinov3_config(source.config, size)
    _write(folder, to_dinov3(source.state), {"config.json": config, "preprocessor_config.json": processor})


def write_timm(folder: Path, source: Pretrained) -> None:
    """Write a folder for timm's `create_model("local-dir:FOLDER", pretrained=True)`, without its model card."""
    config, size = source.config, source.image_size or IMAGE_SIZE
    arguments = {
        "img_size": size, "patch_size": config.patch_size, "in_chans": config.in_chans, "num_classes": 0,
        "embed_dim": config.embed_dim, "depth": config.depth, "num_heads": config.num_heads, "global_pool": "token",
        "attn_type": "rope", "qkv_bias": True, "num_reg_tokens": 0, "init_values": None, "use_fc_norm": False,
        "use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_temperature": BASE,
        "rope_rotate_half": True, "dynamic_img_size": True,
    }  # fmt: skip
    images = {
        "input_size": [config.in_chans, size, size], "fixed_input_size": False, "interpolation": "bicubic",
        "crop_pct": 1.0, "crop_mode": "squash", "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD),
        "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head",
    }  # fmt: skip
    model = {
        "architecture": "vit_large_patch16_dinov3_qkvb", "num_features": config.embed_dim, "model_args": arguments,
        "pretrained_cfg": images,
    }  # fmt: skip
    state = {name: tensor.float().contiguous() for name, tensor in source.state.items() if "periods" not in name}
    if config.norm_eps != TIMM_EPS:
        how = f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={config.norm_eps:g})"
        log.warning("timm's folders cannot state the epsilon of norms: pass %s to create_model", how)
    _write(folder, state, {"config.json": model})


def _write(folder: Path, state: dict[str, Tensor], contents: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def hf_features(folder: Path, source: Pretrained, images: Tensor) -> tuple[str, Tensor] | None:
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


def timm_features(folder: Path, source: Pretrained, images: Tensor) -> tuple[str, Tensor] | None:
    """The version of timm and its patch tokens of normalised images; None if it is not installed."""
    try:
        import timm
    except ImportError:
        return None
    norm = partial(nn.LayerNorm, eps=source.config.norm_eps)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, norm_layer=norm).eval()
    with torch.inference_mode():
        return f"timm {timm.__version__}", model.forward_features(images)[:, 1:]


def model_card(source: Pretrained, package: str, license: str | None) -> str:
    """Content of README.md: sizes, step, data and metrics of the run as far as they are known, and the licence.

    `license` is an identifier of the Hugging Face hub; None: "other", to be filled in.
    """
    config, run = source.config, run_folder(source.path)
    settings = run_settings(source.path)
    data, name = settings.get("data", {}), settings.get("run", {}).get("name")
    rows = {"weights": source.path.name + (", moving average" if source.ema else "")}
    rows |= {} if source.step is None else {"step": f"{source.step:,} of {settings.get('train', {}).get('steps', '?')}"}
    rows |= {} if source.frames is None else {"frames seen": f"{source.frames:,}"}
    if data:
        sets = [Path(str(path)).stem for path in data.get("manifests") or []]
        folder = Path(str(data["root"])).name if data.get("root") else "fastmum's embedded scenes"
        rows |= {"data": ", ".join(sets) or folder}
    lines = [m for m in read_metrics(RunDir(run).metrics) if m.get("step", 0) <= (source.step or 0)] if run else []
    for metric in SHOWN:
        found = [line for line in lines if line.get(metric) is not None]
        rows |= {metric.replace("_", " "): f"{found[-1][metric]:.4f} (step {found[-1]['step']:,})"} if found else {}
    unstated = "not stated. Whoever publishes these weights sets `license` above, as the terms of the data permit"
    return CARD.format(
        package=package, license=license or "other", title=name or source.path.stem, terms=license or unstated,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()), patch=config.patch_size,
        size=source.image_size or IMAGE_SIZE, sizes=f"{config.depth} blocks of width {config.embed_dim}, "
        f"{config.num_heads} heads, patches of {config.patch_size} pixels and norms of epsilon {config.norm_eps:g}",
    )  # fmt: skip

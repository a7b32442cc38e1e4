"""Encoders of others by `KIND:PATH`: DINOv3, MAE, CroCo v2, and timm's models that compute the same.

Files are recognised by their keys. What has such keys but computes something else is refused by name.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastmum.errors import first_line
from fastmum.files import expand_user
from fastmum.model.options import TABLES, EncoderOptions
from fastmum.pretrained.croco import from_croco
from fastmum.pretrained.dinov3 import from_dinov3
from fastmum.pretrained.files import MODEL_TYPES, Saved, read_file
from fastmum.pretrained.layout import NORMALISATIONS, WRAPPERS, Found, State, WeightsError, find_state
from fastmum.pretrained.mae import from_mae
from fastmum.pretrained.timm_files import check_architecture, find_timm

log = logging.getLogger(__name__)

KINDS = {
    "dinov3": "DINOv3 ViT-S, B or L: a .pth, a folder of transformers, timm's file or folder",
    "mae": "MAE: a .pth with or without decoder, a folder of transformers, timm's file or folder",
    "croco": "CroCo v2, DUSt3R or MASt3R: a .pth",
    "timm": "a model of timm that computes the same as one of these, in the local cache of the hub, or a path",
}
READERS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any], Mapping[str, Any]], Found]] = {
    "dinov3": from_dinov3, "mae": from_mae, "croco": from_croco,
}  # fmt: skip


class Layout(NamedTuple):
    """Names in a file of one source."""

    kind: str  # "mum", or a key of `READERS`
    signs: tuple[str, ...]  # patterns; each matches a name, without prefix
    anchors: tuple[str, ...] = ()  # names by which the prefix is found


PLAIN = "cls_token", "patch_embed.proj.weight", "norm.weight"
# The first whose signs are all there.
LAYOUTS = (
    Layout("croco", (r"enc_blocks\.0\.",), ("patch_embed.proj.weight", "enc_norm.weight")),
    Layout("dinov3", (r"layer\.0\.attention\.q_proj\.",),
           ("embeddings.cls_token", "embeddings.patch_embeddings.weight")),
    Layout("mae", (r"embeddings\.position_embeddings$",), ("embeddings.cls_token", "embeddings.position_embeddings")),
    Layout("dinov3", (r"storage_tokens$|blocks\.0\.ls1\.gamma$",), PLAIN),
    Layout("mum", (r"rope_embed\.periods$",)),
    Layout("mae", (r"cls_token$", r"pos_embed$"), (*PLAIN, "pos_embed")),
    Layout("dinov3", (r"cls_token$", r"blocks\.0\.gamma_1$"), PLAIN),
    Layout("dinov3", (r"cls_token$", r"blocks\.0\.attn\.qkv\.weight$"), PLAIN),  # without LayerScale, timm's exports
)  # fmt: skip
# Patterns, each of which a name matches, and what such a file is.
REFUSED = (
    ((r"mlp\.(w1|w12|fc1_g|gate_proj)\.",), "has SwiGLU layers (DINOv3's plus sizes and 7B, DINOv2's giant)"),
    ((r"pos_embed$", r"ls1\.gamma$"), "is a DINOv2"),
    ((r"position_embeddings$", r"layer_scale1\.lambda1$"), "is a DINOv2"),
    ((r"fc_norm\.",), "is finetuned for classification: it has fc_norm instead of the last norm"),
    ((r"enc_pos_embed$",), "is CroCo v1, which has a table of positions"),
    ((r"attn\.(q_norm|k_norm)\.",), "normalises queries and keys"),
    ((r"downsample_layers\.|stages\.0\.",), "is a ConvNeXt"),
)


class Public(NamedTuple):
    """Weights of a public encoder under fastmum's names."""

    kind: str  # a key of `READERS`
    path: Path
    state: State
    sizes: Mapping[str, Any]  # fields of `ModelConfig` that the shapes do not determine
    options: EncoderOptions
    image_size: int | None


def read_public(kind: str, where: str, overrides: Mapping[str, Any]) -> Public:
    """The weights of KIND:WHERE; `overrides` as in `fastmum.load_pretrained`. WeightsError if it cannot be used."""
    path, about = find_timm(where) if kind == "timm" else (expand_user(where), {})
    saved = read_file(path)
    about = about or saved.config
    check_architecture(path, about)
    model = saved.config.get("model_type")
    if model is not None and model not in MODEL_TYPES:
        raise WeightsError(f"'{path}' is transformers' {model}, which fastmum's encoder does not compute")
    layout = _layout(saved)
    found_kind = None if layout is None else layout.kind
    if layout is None or found_kind not in READERS or kind not in (found_kind, "timm"):
        other = f"it is a {found_kind}: write {found_kind}:PATH" if found_kind in READERS else "its keys are others"
        other = "it is a MuM: write its path only" if found_kind == "mum" else other
        raise WeightsError(f"'{path}' does not hold an encoder of the kind {kind}: {other}")
    tensors = find_state(saved.path, saved.tree, overrides.get("key"), layout.anchors, f"a {layout.kind} encoder")
    if kind == "timm":  # classifiers
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    stated = saved.tree.get("croco_kwargs", {}) if layout.kind == "croco" else about
    try:
        state, sizes, options = READERS[layout.kind](tensors, stated, overrides)
    except WeightsError as error:
        raise WeightsError(f"'{path}' is not supported: {error}") from None
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise WeightsError(f"'{path}' does not hold an encoder of the kind {kind} ({what})") from None
    if layout.kind == "dinov3" and options["layer_scale"] and "registers" not in options:
        log.warning("'%s' has no registers, unlike every released DINOv3", path)
    options |= _normalisation(saved, about, overrides.get("normalisation"))
    if "rope_rescale" in overrides and layout.kind == "dinov3":
        options["rope_rescale"] = _factor(overrides["rope_rescale"])
    if layout.kind == "mae":
        options["resize"] = overrides.get("table") or ("antialias" if kind == "timm" else "bicubic")
        if options["resize"] not in TABLES:
            raise WeightsError(f"table is '{options['resize']}', but must be one of {', '.join(TABLES)}")
    return Public(layout.kind, path, state, sizes, EncoderOptions(**options), saved.image_size)


def kind_of(saved: Saved) -> str:
    """The kind of public encoder in a file, "" if it is none or a MuM; WeightsError if it is refused by name."""
    layout = _layout(saved)
    return "" if layout in (None, LAYOUTS[-1]) or layout.kind == "mum" else layout.kind


def _layout(saved: Saved) -> Layout | None:
    names = {WRAPPERS.sub("", name) for name in _names(saved.tree)}

    def there(patterns: Iterable[str]) -> bool:
        return all(any(re.search(rf"(^|\.)({pattern})", name) for name in names) for pattern in patterns)

    for patterns, what in REFUSED:
        if there(patterns):
            raise WeightsError(f"'{saved.path}' {what}, which fastmum's encoder does not compute")
    return next((layout for layout in LAYOUTS if there(layout.signs)), None)


def _names(tree: Mapping[str, Any]) -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield str(name)
        elif isinstance(value, Mapping):
            yield from _names(value)


def _normalisation(saved: Saved, about: Mapping[str, Any], name: Any) -> dict[str, tuple[float, ...]]:
    """Fields of `EncoderOptions`: of a name, else as the folder states it, else none."""
    if name is not None:
        if name not in NORMALISATIONS:
            raise WeightsError(f"normalisation is '{name}', but must be one of {', '.join(NORMALISATIONS)}")
        return dict(zip(("mean", "std"), NORMALISATIONS[name], strict=True))
    timm = about.get("pretrained_cfg", about)
    for table, keys in ((saved.images, ("image_mean", "image_std")), (timm, ("mean", "std"))):
        mean, std = (table.get(key) if isinstance(table, Mapping) else None for key in keys)
        if isinstance(mean, list | tuple) and isinstance(std, list | tuple):
            return {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
    return {}


def _factor(given: Any) -> float | None:
    if given in (None, 1):
        return None
    if not isinstance(given, int | float) or not 1 < given < 100:
        raise WeightsError(f"rope_rescale is {given}, but must be a number from 1 (none) to 100; DINOv3's code has 2")
    return float(given)


def fold(state: State, options: EncoderOptions, trainable: bool) -> tuple[State, EncoderOptions]:
    """Multiply LayerScale and masks of biases into the weights.

    That is exact for a frozen encoder. If `trainable`, they stay apart, except where they are 1 throughout.
    """
    names = [name for name in state if name.endswith((".scale", ".bias_mask"))]
    keep = {name.rpartition(".")[2] for name in names if trainable and state[name].ne(1).any()}
    folded = dict(state)
    for name in names:
        layer, _, what = name.rpartition(".")
        if what not in keep:
            factor = folded.pop(name).float()
            folded[f"{layer}.bias"] = folded[f"{layer}.bias"].float() * factor
            if what == "scale":
                folded[f"{layer}.weight"] = folded[f"{layer}.weight"].float() * factor[:, None]
    return folded, replace(options, layer_scale="scale" in keep, masked_bias="bias_mask" in keep)

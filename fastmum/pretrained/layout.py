"""Finding the state dict of a MuM among saved tensors, its sizes from their shapes, and errors of weights."""

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.errors import FastmumError, some_names
from fastmum.model.config import PRESETS, ModelConfig
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD

log = logging.getLogger(__name__)

State = dict[str, Tensor]

SIZES = tuple(field.name for field in dataclasses.fields(ModelConfig))
RELEASED_FIRST = tuple(dict.fromkeys(("mum_vitl16_released", *PRESETS)))  # presets in the order of preference
DECODER = ("mask_token", "decoder_", "rope_embed_decoder.")
# Keys of every MuM, with or without decoder.
ANCHORS = ("cls_token", "patch_embed.proj.weight", "rope_embed.periods", "norm.weight")
# Mean and standard deviation of images in 0..1, RGB: "half" of DUSt3R, "sat493m" of DINOv3's satellite models.
NORMALISATIONS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": ((0.5,) * 3, (0.5,) * 3),
    "sat493m": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
}  # fmt: skip
# Parts of names that torch.compile, FSDP and activation checkpointing insert.
WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
NESTING = 4  # levels of mappings that are searched


class WeightsError(FastmumError):
    """Weights that cannot be used."""


class MismatchError(WeightsError):
    """A state dict that does not fit the model; `missing`, `extra` and `misshapen` are its keys with their shapes."""

    def __init__(self, where: str, missing: Sequence[str], extra: Sequence[str], misshapen: Sequence[str]) -> None:
        self.missing, self.extra, self.misshapen = list(missing), list(extra), list(misshapen)
        findings = [("missing", missing), ("unexpected", extra), ("of another shape", misshapen)]
        super().__init__(f"{where}: {'; '.join(f'{what} {some_names(keys)}' for what, keys in findings if keys)}")


class Found(NamedTuple):
    """A public encoder under fastmum's names."""

    state: State
    sizes: dict[str, Any]  # fields of `ModelConfig` that the tensors do not determine
    options: dict[str, Any]  # fields of `EncoderOptions`


def rename(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    """Tensors with each of the patterns `names` replaced in their names, in this order."""
    state = {}
    for name, tensor in tensors.items():
        for pattern, ours in names.items():
            name = re.sub(pattern, ours, name)
        state[name] = tensor
    return state


class _Candidate(NamedTuple):
    name: str  # mappings and prefix, joined by dots
    state: State
    left_out: list[str]
    anchors: int


def find_state(
    path: Path, tree: Mapping[str, Any], key: str | None, anchors: Sequence[str] = ANCHORS, model: str = "a MuM"
) -> State:
    """The state dict of a model in saved mappings, without wrappers and prefixes; `anchors` are keys of every one.

    `key` is its place, such as "teacher" or "model.backbone"; None: there is only one. WeightsError if there is no such
    state dict, or several; `path` is for messages.
    """
    found = []
    for place, tensors in _groups(tree, "", NESTING):
        plain = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
        prefixes = Counter(n.removesuffix(a) for n in plain for a in anchors if f".{n}".endswith(f".{a}"))
        for prefix, count in prefixes.items():
            state = {name.removeprefix(prefix): t for name, t in plain.items() if name.startswith(prefix)}
            left_out = [name for name in plain if not name.startswith(prefix)]
            found.append(_Candidate((place + prefix).removesuffix("."), state, left_out, count))
    if not found:
        keys = some_names([str(name) for name in tree]) or "none"
        raise WeightsError(f"'{path}' does not hold {model}: none of {', '.join(anchors)} is among its keys ({keys})")
    best = max(candidate.anchors for candidate in found)
    found = [candidate for candidate in found if candidate.anchors == best]
    names = ", ".join(f"'{candidate.name}'" for candidate in found)
    if key is not None:
        found = [c for c in found if c.name == key or c.name.startswith(f"{key}.")]
        if not found:
            raise WeightsError(f"'{path}' does not hold {model} at key='{key}'; there is one at {names}")
    if len(found) > 1:
        raise WeightsError(f"'{path}' holds several models, at {names}: choose one by key=")
    (chosen,) = found
    if chosen.left_out:
        log.warning("'%s': uses '%s' and ignores %s", path, chosen.name, some_names(chosen.left_out))
    return chosen.state


def _groups(tree: Mapping[str, Any], place: str, levels: int) -> Iterator[tuple[str, State]]:
    items = {name: value for name, value in tree.items() if isinstance(name, str)}
    tensors = {name: value for name, value in items.items() if isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for name, value in items.items():
        if isinstance(value, Mapping) and levels:
            yield from _groups(value, f"{place}{name}.", levels - 1)


def sizes_by_shape(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of `ModelConfig` from the shapes of a state dict.

    A width is that of most of its tensors, so that one tensor of another shape is detected. The number of heads follows
    from the rotary periods, whose number is a quarter of a head's width. Fields that no tensor determines, such as the
    decoder of an encoder, are those of the preset that agrees best, `mum_vitl16_released` first.
    """
    kernel = state.get("patch_embed.proj.weight")
    width = _width(state, r"(norm|blocks\.\d+\.norm[12])\.(weight|bias)|cls_token|patch_embed\.proj\.bias")
    decoder_norms = r"(decoder_norm|decoder_(frame|global)_blocks\.\d+\.norm[12])\.(weight|bias)"
    decoder_width = _width(state, rf"{decoder_norms}|mask_token")
    shape = kernel.shape if kernel is not None and kernel.ndim == 4 else (None,) * 4
    found = {
        "embed_dim": width, "depth": _depth(state, r"blocks\.(\d+)\."),
        "num_heads": _heads(width, state.get("rope_embed.periods")), "decoder_embed_dim": decoder_width,
        "decoder_depth": 2 * _depth(state, r"decoder_(?:frame|global)_blocks\.(\d+)\."),
        "decoder_num_heads": _heads(decoder_width, state.get("rope_embed_decoder.periods")),
        "in_chans": shape[1], "patch_size": shape[2],
    }  # fmt: skip
    known = {name: size for name, size in found.items() if size}
    presets = (PRESETS[name] for name in RELEASED_FIRST)
    nearest = max(presets, key=lambda preset: sum(getattr(preset, name) == size for name, size in known.items()))
    sizes = vars(nearest) | known
    for name, heads in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
        if sizes[name] % (4 * sizes[heads]):  # no periods, and the preset's heads do not divide the width
            sizes[heads] = 1
    return sizes


def resample_patches(kernel: Tensor, patch_size: int) -> Tensor:
    """Weights (D, C, p, p) of a patch embedding for patches of another size, (D, C, patch_size, patch_size).

    Images that are resized by patch_size / p then have the same tokens, as nearly as least squares can: the weights are
    multiplied by the pseudo-inverse of the resizing (FlexiViT, section 3.4), here bilinear with antialiasing, by rows
    and columns. Digests need the same bits on any CPU: no sum is left to a library.
    """
    rows, columns = (_resizing_inverse(old, patch_size) for old in kernel.shape[2:])
    x = kernel.double()
    x = sum((x[..., i, None] * weights for i, weights in enumerate(columns)), torch.zeros(()))
    x = sum((x[..., i, None, :] * weights[:, None] for i, weights in enumerate(rows)), torch.zeros(()))
    return x.to(kernel.dtype)


def _resizing_inverse(old: int, new: int) -> Tensor:
    """Pseudo-inverse (old, new) of the resizing of `old` pixels to `new`, float64 of the precision of float32."""
    pixels = torch.eye(old, dtype=torch.float64).view(old, 1, 1, old)
    resizing = F.interpolate(pixels, (1, new), mode="bilinear", antialias=True).view(old, new).T
    return torch.linalg.pinv(resizing).float().double()


def _width(state: Mapping[str, Tensor], pattern: str) -> int | None:
    widths = Counter(t.shape[-1] for name, t in state.items() if re.fullmatch(pattern, name) and t.ndim)
    return widths.most_common(1)[0][0] if widths else None


def _depth(state: Iterable[str], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)


def _heads(width: int | None, periods: Tensor | None) -> int | None:
    if width is None or periods is None or not periods.numel() or width % (4 * periods.numel()):
        return None
    return width // (4 * periods.numel())

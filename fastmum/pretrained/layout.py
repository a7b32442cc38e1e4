"""What a state dict is of: the tensors of a MuM among others, and the sizes that their shapes tell."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastmum.model.config import PRESETS
from fastmum.pretrained.errors import WeightsError, some

log = logging.getLogger(__name__)

State = dict[str, Tensor]

DECODER = ("mask_token", "decoder_", "rope_embed_decoder.")
# Keys that every MuM has, with its decoder and without.
ANCHORS = ("cls_token", "patch_embed.proj.weight", "rope_embed.periods", "norm.weight")
# What torch.compile, FSDP and activation checkpointing put into names.
WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
NESTING = 4  # levels of mappings that are looked into


class _Candidate(NamedTuple):
    """A state dict that may be a MuM's; `name` says where it lies: mappings and prefix, joined by dots."""

    name: str
    state: State
    left_out: list[str]
    anchors: int


def find_state(path: Path, tree: Mapping[str, Any], key: str | None) -> State:
    """The state dict of a MuM among what was saved, without wrappers and prefixes.

    Args:
        path: for messages.
        tree: names -> tensors or further mappings.
        key: where it lies, such as "teacher" or "model.backbone"; None: there is one only.

    Raises:
        WeightsError: there is none, or several.
    """
    found = list(_candidates(tree))
    if not found:
        keys = some([str(name) for name in tree]) or "none"
        raise WeightsError(f"'{path}' does not hold a MuM: none of {', '.join(ANCHORS)} is among its keys ({keys})")
    best = max(candidate.anchors for candidate in found)
    found = [candidate for candidate in found if candidate.anchors == best]
    names = ", ".join(f"'{candidate.name}'" for candidate in found)
    if key is not None:
        found = [c for c in found if c.name == key or c.name.startswith(f"{key}.")]
        if not found:
            raise WeightsError(f"'{path}' holds no MuM at key='{key}'; there is one at {names}")
    if len(found) > 1:
        raise WeightsError(f"'{path}' holds several models, at {names}: choose one by key=")
    (chosen,) = found
    if chosen.left_out:
        log.warning("'%s': '%s' is taken, and left out %s", path, chosen.name, some(chosen.left_out))
    return chosen.state


def _candidates(tree: Mapping[str, Any]) -> Iterator[_Candidate]:
    for place, tensors in _groups(tree, "", NESTING):
        names = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
        prefixes = Counter(name.removesuffix(anchor) for name in names for anchor in ANCHORS if _ends(name, anchor))
        for prefix, anchors in prefixes.items():
            state = {name.removeprefix(prefix): t for name, t in names.items() if name.startswith(prefix)}
            left_out = [name for name in names if not name.startswith(prefix)]
            yield _Candidate((place + prefix).removesuffix("."), state, left_out, anchors)


def _ends(name: str, anchor: str) -> bool:
    return name == anchor or name.endswith(f".{anchor}")


def _groups(tree: Mapping[str, Any], place: str, levels: int) -> Iterator[tuple[str, State]]:
    """Every mapping with the tensors in it, and where it lies."""
    items = {name: value for name, value in tree.items() if isinstance(name, str)}
    tensors = {name: value for name, value in items.items() if isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for name, value in items.items():
        if isinstance(value, Mapping) and levels:
            yield from _groups(value, f"{place}{name}.", levels - 1)


def has_decoder(state: Iterable[str]) -> bool:
    """Whether keys of the decoder are among those of a state dict."""
    return any(name.startswith(DECODER) for name in state)


def sizes_by_shape(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Fields of `ModelConfig` by the shapes of a state dict.

    Widths are what most of their tensors say, so that a single one of another shape is found out. Heads are not in the
    weights, but the number of rotary periods is a quarter of a head's width. What no tensor tells, such as the decoder
    of an encoder by itself, is that of the preset of the same encoder, else of `mum_vitl16_released`.
    """
    kernel = state.get("patch_embed.proj.weight")
    told = {
        "embed_dim": _width(state, r"(norm|blocks\.\d+\.norm[12])\.(weight|bias)|cls_token|patch_embed\.proj\.bias"),
        "depth": _depth(state, r"blocks\.(\d+)\."),
        "decoder_embed_dim": _width(
            state, r"(decoder_norm|decoder_(frame|global)_blocks\.\d+\.norm[12])\.(weight|bias)|mask_token"
        ),
        "decoder_depth": 2 * (_depth(state, r"decoder_(?:frame|global)_blocks\.(\d+)\.") or 0) or None,
    }
    if kernel is not None and kernel.ndim == 4:
        told |= {"in_chans": kernel.shape[1], "patch_size": kernel.shape[2]}
    told |= {
        "num_heads": _heads(told["embed_dim"], state.get("rope_embed.periods")),
        "decoder_num_heads": _heads(told["decoder_embed_dim"], state.get("rope_embed_decoder.periods")),
    }
    told = {name: size for name, size in told.items() if size is not None}
    sizes = _likeliest(told) | told
    for width, heads in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
        if sizes[width] % (4 * sizes[heads]):  # the periods are absent, and the preset's heads do not fit
            sizes[heads] = 1
    return sizes


def _likeliest(told: Mapping[str, int]) -> dict[str, Any]:
    """Sizes of the preset that agrees with most of what is told."""
    presets = [PRESETS["mum_vitl16_released"], *PRESETS.values()]  # of equals, the first
    return vars(max(presets, key=lambda preset: sum(getattr(preset, name) == size for name, size in told.items())))


def _width(state: Mapping[str, Tensor], pattern: str) -> int | None:
    widths = Counter(t.shape[-1] for name, t in state.items() if re.fullmatch(pattern, name) and t.ndim)
    return widths.most_common(1)[0][0] if widths else None


def _depth(state: Iterable[str], pattern: str) -> int | None:
    numbers = [int(found[1]) for name in state if (found := re.match(pattern, name))]
    return 1 + max(numbers) if numbers else None


def _heads(width: int | None, periods: Tensor | None) -> int | None:
    if width is None or periods is None or not periods.numel() or width % (4 * periods.numel()):
        return None
    return width // (4 * periods.numel())

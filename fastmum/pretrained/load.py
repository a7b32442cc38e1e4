"""Models from weights: `fastmum.load_pretrained`. docs/weights.md says what loads, and how it is told apart."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmum.model.config import PRESETS, ModelConfig
from fastmum.model.encoder import Encoder
from fastmum.model.mum import MuM
from fastmum.model.rope import AxialRope
from fastmum.pretrained.errors import MismatchError, WeightsError
from fastmum.pretrained.files import Saved, read_saved
from fastmum.pretrained.layout import DECODER, State, find_state, has_decoder, sizes_by_shape

log = logging.getLogger(__name__)

SIZES = tuple(field.name for field in dataclasses.fields(ModelConfig))
OPTIONS = ("encoder_only", "key", "rope_dtype")  # what `read_pretrained` takes besides sizes
PLACEMENT = ("device", "dtype")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PERIODS = {"rope_embed.periods": ("embed_dim", "num_heads"),
           "rope_embed_decoder.periods": ("decoder_embed_dim", "decoder_num_heads")}  # fmt: skip


class Pretrained(NamedTuple):
    """Weights that have been read and fit their model.

    Args:
        path: the file, or the checkpoint of a run that was chosen.
        config: sizes of the model; those of the decoder mean nothing where there is none.
        state: a state dict on the CPU, in the model's order.
        encoder_only: whether it is of an `Encoder`, else of a `MuM`.
        rope_dtype: what the encoder computes positions in.
        step: of the run, where that is known.
    """

    path: Path
    config: ModelConfig
    state: State
    encoder_only: bool
    rope_dtype: torch.dtype
    step: int | None

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        what = "encoder" if self.encoder_only else "encoder and decoder"
        positions = f"positions in {str(self.rope_dtype).removeprefix('torch.')}"
        return f"{what}, {_preset(self.config, self.encoder_only) or 'sizes of no preset'}, {positions}"


def load_pretrained(path: str | os.PathLike[str], **overrides: Any) -> Encoder | MuM:
    """A model with weights from a file, a run or a checkpoint, in eval mode.

    Args:
        path: a run, a folder of checkpoints, a checkpoint, a file of torch.save (the released ones, or what
            `fastmum.export` writes) or of safetensors, a folder of transformers with such an encoder. It is told apart
            by what is in it, not by its name.
        overrides: fields of `ModelConfig` that the weights do not tell (`norm_eps`, `decoder_num_heads`), and
            encoder_only: True leaves the decoder away, False demands one; default: what is there.
            rope_dtype: in which the encoder computes positions, torch.float32 or torch.bfloat16 (or their names).
                Default: bfloat16 where the periods are in bfloat16 beside weights that are not, as in the released
                encoder by itself, else float32.
            key: which model of a file with several, such as "teacher".
            device: default "cpu".
            dtype: of the parameters, default float32. Positions are computed in `rope_dtype` all the same.

    Returns:
        An `Encoder`, or a `MuM` where the weights have a decoder.

    Raises:
        WeightsError: nothing to be read, no MuM in it, an override that is unknown or cannot be.
        MismatchError: keys that are missing, too many or of another shape; all are listed, with what is expected.
    """
    check_names(overrides, (*SIZES, *OPTIONS, *PLACEMENT))
    placement = {name: overrides.pop(name) for name in PLACEMENT if name in overrides}
    return build(read_pretrained(path, **overrides), **placement)


def read_pretrained(path: str | os.PathLike[str], **overrides: Any) -> Pretrained:
    """The weights that `load_pretrained` puts into a model.

    Args:
        path, overrides: as there, without `device` and `dtype`.

    Raises:
        WeightsError, MismatchError: as there.
    """
    check_names(overrides, (*SIZES, *OPTIONS))
    saved = read_saved(Path(path).expanduser())
    state = find_state(saved.path, saved.tree, overrides.get("key"))
    encoder_only = _is_encoder_only(saved, state, overrides.get("encoder_only"))
    if encoder_only:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(DECODER)}
    sizes = {name: overrides[name] for name in SIZES if name in overrides}
    config = _config(saved, state, sizes)
    rope_dtype = _dtype(overrides["rope_dtype"], "rope_dtype") if overrides.get("rope_dtype") else _rope_dtype(state)
    wanted = _empty(config, encoder_only).state_dict()
    absent = [name for name in PERIODS if saved.learnt_only and name in wanted and name not in state]
    state = state | _periods(state, config, rope_dtype, sizes, absent)
    named = "the model that it names" if saved.sizes and not sizes else _preset(config, encoder_only) or "the model"
    _check_fit(f"'{saved.path}' does not hold {named}", state, wanted)
    pretrained = Pretrained(saved.path, config, {n: state[n] for n in wanted}, encoder_only, rope_dtype, saved.step)
    log.info("'%s': %s", saved.path, pretrained.title)
    return pretrained


def build(
    pretrained: Pretrained, device: torch.device | str = "cpu", dtype: torch.dtype | str = torch.float32
) -> Encoder | MuM:
    """The model of weights that have been read; see `load_pretrained`.

    Raises:
        WeightsError: an unknown dtype, or a device that cannot be used.
    """
    dtype = _dtype(dtype, "dtype")
    model = _empty(pretrained.config, pretrained.encoder_only)
    for parameter in model.parameters():  # not the buffers: positions need their own precision
        parameter.data = parameter.data.to(dtype)
    model.rope_embed.to(pretrained.rope_dtype)
    try:
        model = model.to_empty(device=device)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(f"device '{device}' cannot be used ({str(error).partition(chr(10))[0]})") from None
    model.load_state_dict(pretrained.state)
    return model.eval()


def check_names(overrides: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Look for overrides that there are not.

    Raises:
        WeightsError: one that is not known.
    """
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise WeightsError(f"unknown override '{name}'; the nearest is '{near}' (there are {', '.join(known)})")


def _dtype(given: Any, name: str) -> torch.dtype:
    dtype = DTYPES.get(given.removeprefix("torch.")) if isinstance(given, str) else given
    if dtype not in DTYPES.values():
        raise WeightsError(f"{name} is {given!r}, but must be one of {', '.join(DTYPES)}")
    return dtype


def _is_encoder_only(saved: Saved, state: State, wanted: bool | None) -> bool:
    if wanted is None:
        return not has_decoder(state)
    if not wanted and not has_decoder(state):
        raise WeightsError(f"'{saved.path}' holds an encoder without a decoder, but encoder_only is False")
    return bool(wanted)


def _config(saved: Saved, state: State, given: Mapping[str, Any]) -> ModelConfig:
    try:
        return ModelConfig(**{**sizes_by_shape(state), **saved.sizes, **given})
    except (TypeError, ValueError) as error:
        raise WeightsError(f"'{saved.path}' does not hold a MuM of possible sizes ({error})") from None


def _rope_dtype(state: State) -> torch.dtype:
    periods, others = state.get("rope_embed.periods"), state.get("norm.weight")
    rounded = periods is not None and periods.dtype == torch.bfloat16
    return torch.bfloat16 if rounded and (others is None or others.dtype != torch.bfloat16) else torch.float32


def _periods(
    state: State, config: ModelConfig, rope_dtype: torch.dtype, given: Mapping[str, Any], absent: Sequence[str]
) -> State:
    """Periods that are computed instead of read: absent ones, of heads that were given, and rounded when saved."""
    periods = {}
    for name, (width, heads) in PERIODS.items():
        if name not in state and name not in absent:
            continue
        rope = AxialRope(getattr(config, width) // getattr(config, heads))
        rope.init_weights()
        dtype = rope_dtype if name.startswith("rope_embed.") else torch.float32
        saved = state.get(name, rope.periods)
        rounded = saved.dtype.itemsize < dtype.itemsize and _is_rounded(saved, rope.periods)
        if name in absent or heads in given or rounded:
            periods[name] = rope.periods
    return periods


def _is_rounded(saved: Tensor, exact: Tensor) -> bool:
    """Whether periods are what is left of others in a narrower dtype, in which their exponents were rounded, too."""
    tolerance = 2 * torch.finfo(saved.dtype).eps
    return saved.shape == exact.shape and torch.allclose(saved.float(), exact, rtol=tolerance, atol=0)


def _preset(config: ModelConfig, encoder_only: bool) -> str | None:
    """The preset of these sizes, None where it is none. Without a decoder, only the encoder's count."""
    counted = [name for name in SIZES if not (encoder_only and name.startswith("decoder_"))]
    first = {"mum_vitl16_released": PRESETS["mum_vitl16_released"]}  # of equals
    for name, preset in (first | PRESETS).items():
        if all(getattr(preset, size) == getattr(config, size) for size in counted):
            return name
    return None


def _empty(config: ModelConfig, encoder_only: bool) -> Encoder | MuM:
    with torch.device("meta"):
        return Encoder(config) if encoder_only else MuM(config)


def _check_fit(where: str, state: State, wanted: Mapping[str, Tensor]) -> None:
    missing = [f"{name} {list(like.shape)}" for name, like in wanted.items() if name not in state]
    extra = [name for name in state if name not in wanted]
    misshapen = [
        f"{name} {list(state[name].shape)} (expected: {list(like.shape)})"
        for name, like in wanted.items()
        if name in state and state[name].shape != like.shape
    ]
    if missing or extra or misshapen:
        raise MismatchError(where, missing, extra, misshapen)

"""Models from weights: `fastmum.load_pretrained`. docs/weights.md lists what loads and how it is detected."""

import difflib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastmum.errors import first_line, some_names
from fastmum.files import expand_user
from fastmum.model.block import AxialRope
from fastmum.model.config import PRESETS, ModelConfig
from fastmum.model.encoder import Encoder
from fastmum.model.mum import MuM
from fastmum.pretrained import layout
from fastmum.pretrained.files import read_saved
from fastmum.pretrained.layout import RELEASED_FIRST, SIZES, MismatchError, State, WeightsError

log = logging.getLogger(__name__)

OPTIONS = ("encoder_only", "key", "rope_dtype", "ema")  # overrides of `read_pretrained` besides sizes
PLACEMENT = ("device", "dtype")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PERIODS = {"rope_embed.periods": ("embed_dim", "num_heads"),
           "rope_embed_decoder.periods": ("decoder_embed_dim", "decoder_num_heads")}  # fmt: skip


class Pretrained(NamedTuple):
    """Weights that fit their model."""

    path: Path  # the file, or the chosen checkpoint of a run
    config: ModelConfig  # without a decoder, its sizes are meaningless
    state: State  # a state dict on the CPU, in the model's order
    encoder_only: bool  # of an `Encoder`, else of a `MuM`
    rope_dtype: torch.dtype  # in which the encoder computes positions
    step: int | None  # of the run, if known
    ema: bool  # the weights are an exponential moving average
    frames: int | None  # seen in training, if known
    image_size: int | None  # side of the training images in pixels, if known

    @property
    def title(self) -> str:
        """What the weights are, in a few words for a log."""
        model = "encoder" if self.encoder_only else "encoder and decoder"
        preset = _preset(self.config, self.encoder_only) or "sizes of no preset"
        positions = str(self.rope_dtype).removeprefix("torch.")
        return f"{model}, {preset}, positions in {positions}{', EMA weights' if self.ema else ''}"


def load_pretrained(path: str | os.PathLike[str], **overrides: Any) -> Encoder | MuM:
    """A model in eval mode with weights from a file, a run or a checkpoint: a `MuM` if they have a decoder.

    WeightsError: nothing can be read, there is no MuM in it, or an override is unknown or invalid. MismatchError: keys
    are missing, unexpected or of another shape; all are listed with the expected shape.

    Args:
        path: a run, a folder of checkpoints, a checkpoint, a torch.save or safetensors file, or a folder of
            transformers with such an encoder. Detected by its content, not by its name.
        overrides: fields of `ModelConfig` that the weights do not determine (`norm_eps`, `decoder_num_heads`), and
            encoder_only: True omits the decoder, False requires one; default: as the weights are.
            rope_dtype: in which the encoder computes positions, torch.float32 or torch.bfloat16 (or their names).
                Default: bfloat16 if only the periods are bfloat16, as in the released encoder-only file, else float32.
            key: which model of a file with several, such as "teacher".
            ema: True reads the EMA weights of a checkpoint, False the others, "auto" (default) EMA if there are any.
            device: default "cpu".
            dtype: of the parameters, default float32. Positions are still computed in `rope_dtype`.
    """
    check_names(overrides, (*SIZES, *OPTIONS, *PLACEMENT))
    placement = {name: overrides.pop(name) for name in PLACEMENT if name in overrides}
    return build(read_pretrained(path, **overrides), **placement)


def read_pretrained(path: str | os.PathLike[str], **overrides: Any) -> Pretrained:
    """The weights of `load_pretrained` without a model; arguments and errors as there, but no `device` and `dtype`."""
    check_names(overrides, (*SIZES, *OPTIONS))
    saved = read_saved(expand_user(path), _ema(overrides.get("ema", "auto")))
    state = layout.find_state(saved.path, saved.tree, overrides.get("key"))
    encoder = {name: tensor for name, tensor in state.items() if not name.startswith(layout.DECODER)}
    if overrides.get("encoder_only") is False and len(encoder) == len(state):
        raise WeightsError(f"'{saved.path}' holds an encoder without a decoder, but encoder_only is False")
    encoder_only = bool(overrides.get("encoder_only")) or len(encoder) == len(state)
    state = encoder if encoder_only else state
    sizes = {name: overrides[name] for name in SIZES if name in overrides}
    try:
        config = ModelConfig(**{**layout.sizes_by_shape(state), **saved.sizes, **sizes})
    except (TypeError, ValueError) as error:
        raise WeightsError(f"'{saved.path}' does not hold a MuM of valid sizes ({error})") from None
    periods, norm = state.get("rope_embed.periods"), state.get("norm.weight")
    rounded = periods is not None and periods.dtype == torch.bfloat16
    found = torch.bfloat16 if rounded and (norm is None or norm.dtype != torch.bfloat16) else torch.float32
    rope_dtype = _dtype(overrides.get("rope_dtype") or found, "rope_dtype")
    expected = _empty(config, encoder_only).state_dict()
    if saved.parameters_only:
        state = {name: _rope(config, name).periods for name in PERIODS if name in expected} | state
    state |= _exact_periods(state, config, rope_dtype, sizes)
    missing = [f"{name} {list(like.shape)}" for name, like in expected.items() if name not in state]
    shapes = {n: (list(t.shape), list(expected[n].shape)) for n, t in state.items() if n in expected}
    misshapen = [f"{name} {shape} (expected: {right})" for name, (shape, right) in shapes.items() if shape != right]
    if missing or misshapen or len(shapes) < len(state):
        model = "the stated model" if saved.sizes and not sizes else _preset(config, encoder_only) or "the model"
        extra = [name for name in state if name not in expected]
        raise MismatchError(f"'{saved.path}' does not hold {model}", missing, extra, misshapen)
    state = {name: state[name] for name in expected}
    if odd := [n for n, t in state.items() if t.layout != torch.strided or t.is_meta or not t.is_floating_point()]:
        raise WeightsError(f"'{saved.path}' has weights that are not dense floating-point numbers: {some_names(odd)}")
    about = saved.step, saved.ema, saved.frames, saved.image_size
    pretrained = Pretrained(saved.path, config, state, encoder_only, rope_dtype, *about)
    log.info("'%s': %s", saved.path, pretrained.title)
    return pretrained


def build(
    pretrained: Pretrained, device: torch.device | str = "cpu", dtype: torch.dtype | str = torch.float32
) -> Encoder | MuM:
    """The model of weights; arguments as in `load_pretrained`. WeightsError for an unusable dtype or device."""
    dtype = _dtype(dtype, "dtype")
    model = _empty(pretrained.config, pretrained.encoder_only)
    for parameter in model.parameters():  # not the buffers: positions have a separate precision
        parameter.data = parameter.data.to(dtype)
    model.rope_embed.to(pretrained.rope_dtype)
    try:
        model = model.to_empty(device=device)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(f"device '{device}' cannot be used ({first_line(error)})") from None
    model.load_state_dict(pretrained.state)
    return model.eval()


def check_names(overrides: Iterable[str], known: tuple[str, ...]) -> None:
    """Raise WeightsError for the first name that is not one of `known`."""
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise WeightsError(f"unknown override '{name}'; the nearest is '{near}' (there are {', '.join(known)})")


def _dtype(given: Any, name: str) -> torch.dtype:
    dtype = DTYPES.get(str(given).removeprefix("torch."))
    if dtype is None:
        raise WeightsError(f"{name} is '{given}', but must be one of {', '.join(DTYPES)}")
    return dtype


def _ema(given: Any) -> bool | None:
    choices = {"auto": None, "on": True, "true": True, "off": False, "false": False}
    if str(given).lower() not in choices:
        raise WeightsError(f"ema is '{given}', but must be one of auto, on, off")
    return choices[str(given).lower()]


def _rope(config: ModelConfig, name: str) -> AxialRope:
    width, heads = PERIODS[name]
    rope = AxialRope(getattr(config, width) // getattr(config, heads))
    rope.init_weights()
    return rope


def _exact_periods(state: State, config: ModelConfig, rope_dtype: torch.dtype, given: Mapping[str, Any]) -> State:
    """Periods that are computed instead of read: those of overridden heads, and those that were rounded on saving."""
    periods = {}
    for name in PERIODS.keys() & state.keys():
        saved, exact = state[name], _rope(config, name).periods
        dtype = rope_dtype if name == "rope_embed.periods" else torch.float32
        narrow = saved.dtype.itemsize < dtype.itemsize and saved.shape == exact.shape
        tolerance = 2 * torch.finfo(saved.dtype).eps  # exponents were rounded, too
        rounded = narrow and torch.allclose(saved.float(), exact, rtol=tolerance, atol=0)
        if rounded or PERIODS[name][1] in given:
            periods[name] = exact
    return periods


def _preset(config: ModelConfig, encoder_only: bool) -> str | None:
    """The preset of these sizes, or None. Without a decoder, only the encoder's sizes count."""
    counted = [name for name in SIZES if not (encoder_only and name.startswith("decoder_"))]
    matches = (n for n in RELEASED_FIRST if all(getattr(PRESETS[n], s) == getattr(config, s) for s in counted))
    return next(matches, None)


def _empty(config: ModelConfig, encoder_only: bool) -> Encoder | MuM:
    with torch.device("meta"):
        return Encoder(config) if encoder_only else MuM(config)

"""Models from weights: `fastmum.load_pretrained`, `fastmum.load_encoder`. docs/weights.md lists what loads."""

import difflib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastmum.errors import first_line, some_names
from fastmum.files import expand_user
from fastmum.model.block import AxialRope
from fastmum.model.config import PRESETS, ModelConfig
from fastmum.model.encoder import Encoder
from fastmum.model.mum import MuM
from fastmum.model.options import DEFAULT, EncoderOptions
from fastmum.pretrained import layout
from fastmum.pretrained.files import is_transformers, read_saved
from fastmum.pretrained.layout import RELEASED_FIRST, SIZES, MismatchError, State, WeightsError
from fastmum.pretrained.public import KINDS, fold, kind_of, read_public

log = logging.getLogger(__name__)

RANDOM = "random"  # followed by a preset: untrained weights
PATHLESS = RANDOM, "timm"  # kinds that may be followed by a name
OWN = ("encoder_only", "key", "rope_dtype", "ema", "trainable")  # overrides of MuM's weights besides sizes
PUBLIC = ("encoder_only", "key", "trainable", "normalisation")  # of any other encoder's
OPTIONS = tuple(dict.fromkeys((*OWN, *PUBLIC, "table", "rope_rescale", "seed")))  # all
PLACEMENT = ("device", "dtype")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PERIODS = {"rope_embed.periods": ("embed_dim", "num_heads"),
           "rope_embed_decoder.periods": ("decoder_embed_dim", "decoder_num_heads")}  # fmt: skip


class Pretrained(NamedTuple):
    """Weights that fit their model."""

    spec: str  # what was asked for
    kind: str  # "mum", "random" or a key of `KINDS`

    path: Path  # the file, or the chosen checkpoint of a run
    config: ModelConfig  # without a decoder, its sizes are meaningless
    state: State  # a state dict on the CPU, in the model's order
    encoder_only: bool  # of an `Encoder`, else of a `MuM`
    rope_dtype: torch.dtype  # in which the encoder computes positions
    step: int | None  # of the run, if known
    ema: bool  # the weights are an exponential moving average
    frames: int | None  # seen in training, if known
    image_size: int | None  # side of the training images in pixels, if known
    options: EncoderOptions = DEFAULT

    @property
    def name(self) -> str:
        """A name for tables and files: that of the run, checkpoint, file or preset."""
        return spec_name(self.spec)

    @property
    def about(self) -> dict[str, Any]:
        """What an encoder is, for records of results."""
        options, config = self.options, self.config
        found = {
            "name": self.name, "spec": self.spec, "kind": self.kind, "mean": list(options.mean),
            "std": list(options.std), "norm_eps": config.norm_eps, "num_heads": config.num_heads,
            "patch_size": config.patch_size,
        }  # fmt: skip
        found |= {"table": options.resize} if options.table else {}
        return found | ({"rope_rescale": options.rope_rescale} if self.kind == "dinov3" else {})

    @property
    def title(self) -> str:
        """What the weights are, in a few words for a log."""
        model = "encoder" if self.encoder_only else "encoder and decoder"
        if self.kind in KINDS:
            return f"{self.kind} encoder, {self.config.depth} blocks of width {self.config.embed_dim}"
        preset = _preset(self.config, self.encoder_only) or "sizes of no preset"
        positions = str(self.rope_dtype).removeprefix("torch.")
        return f"{model}, {preset}, positions in {positions}{', EMA weights' if self.ema else ''}"


def load_pretrained(spec: str | os.PathLike[str], **overrides: Any) -> Encoder | MuM:
    """A model in eval mode with weights from a file, a run or a checkpoint: a `MuM` if they have a decoder.

    WeightsError: nothing can be read, there is no such model in it, or an override is unknown or invalid.
    MismatchError: keys are missing, unexpected or of another shape; all are listed with the expected shape.

    Args:
        spec: a run, a folder of checkpoints, a checkpoint, a torch.save or safetensors file of a MuM or its encoder, or
            a folder of transformers with a DINOv3 or MAE. Detected by its content, not by its name. Or KIND:PATH with
            the weights of another encoder, see `KINDS`, or random:PRESET, see `PRESETS`.
        overrides: fields of `ModelConfig` that the weights do not determine (`norm_eps`, `num_heads`), and
            patch_size: of an encoder, which is resampled for it (`layout.resample_patches`).
            encoder_only: True omits the decoder, False requires one; default: as the weights are.
            rope_dtype: in which the encoder computes positions, torch.float32 or torch.bfloat16 (or their names).
                Default: bfloat16 if only the periods are bfloat16, as in the released encoder-only file, else float32.
            key: which model of a file with several, such as "teacher".
            ema: True reads the EMA weights of a checkpoint, False the others, "auto" (default) EMA if there are any.
            trainable: keep LayerScale and masks of biases apart, for finetuning; default: multiplied into the weights.
            normalisation: of images, a key of `NORMALISATIONS`; default: that of the weights.
            table: of MAE, how its positions are fitted to other sizes, see `position_table`; default "bicubic".
            rope_rescale: of DINOv3, see `EncoderOptions`; default: none.
            seed: of random weights, default 0.
            device: default "cpu".
            dtype: of the parameters, default float32. Positions are still computed in `rope_dtype`.
    """
    check_names(overrides, (*SIZES, *OPTIONS, *PLACEMENT))
    placement = {name: overrides.pop(name) for name in PLACEMENT if name in overrides}
    return build(read_pretrained(spec, **overrides), **placement)


def load_encoder(spec: str | os.PathLike[str], *, trainable: bool = False, **overrides: Any) -> Encoder:
    """The encoder of a spec; arguments and errors as in `load_pretrained`.

    By default it is frozen: in eval mode, no parameter requires a gradient, so nothing is saved for a backward pass. If
    `trainable`, it is in train mode and all parameters require gradients. `about` describes it for records.
    """
    check_names(overrides, (*SIZES, *OPTIONS, *PLACEMENT))
    if overrides.get("encoder_only") is False:
        raise WeightsError("encoder_only is False, but load_encoder loads no decoder: use load_pretrained")
    encoder = load_pretrained(spec, **overrides, encoder_only=True, trainable=trainable)
    return encoder.train(trainable).requires_grad_(trainable)


def split_spec(spec: str | os.PathLike[str]) -> tuple[str, str]:
    """The kind of a spec, "" for fastmum's own weights, and the rest of it."""
    kind, colon, where = os.fspath(spec).partition(":")
    known = colon and kind in (*KINDS, RANDOM)
    return (kind, where) if known else ("", os.fspath(spec))


def spec_name(spec: str) -> str:
    """The name of weights in tables and files: that of the run, checkpoint, file or preset."""
    kind, where = split_spec(spec)
    if kind in PATHLESS:
        return f"untrained {where}" if kind == RANDOM else where
    path = expand_user(where).absolute()
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name} {path.name}"
    return path.parent.name if path.name == "checkpoints" else path.stem if path.is_file() else path.name


def absolute_spec(spec: str) -> str:
    """The spec with its path as an absolute one; those without a path, such as random:mum_vitl16, stay as they are."""
    kind, where = split_spec(spec)
    if RANDOM in (kind, where) or (kind in PATHLESS and not expand_user(where).exists()):
        return spec
    path = os.path.abspath(expand_user(where))
    return f"{kind}:{path}" if kind else path


def read_pretrained(spec: str | os.PathLike[str], **overrides: Any) -> Pretrained:
    """The weights of `load_pretrained` without a model; arguments and errors as there, but no `device` and `dtype`."""
    kind, where = split_spec(spec)
    if kind == RANDOM:
        return _random(where, overrides)
    if not kind and is_transformers(expand_user(where)):
        kind = is_transformers(expand_user(where))
    pretrained = _read_public(kind, where, overrides) if kind else _read_own(where, overrides)
    pretrained = pretrained._replace(spec=os.fspath(spec))
    log.info("'%s': %s", pretrained.path, pretrained.title)
    return pretrained


def _random(preset: str, overrides: Mapping[str, Any]) -> Pretrained:
    check_names(overrides, (*SIZES, "seed", "encoder_only", "trainable"))
    spec = f"{RANDOM}:{preset}"
    if preset not in PRESETS:
        raise WeightsError(f"there is no preset '{preset}' for {RANDOM}:PRESET: one of {', '.join(PRESETS)}")
    try:
        config = replace(PRESETS[preset], **{name: overrides[name] for name in SIZES if name in overrides})
    except ValueError as error:
        raise WeightsError(f"{spec}: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(overrides.get("seed", 0))
        state = MuM(config).state_dict()  # also for an encoder, so that both have the same weights
    encoder_only = bool(overrides.get("encoder_only"))
    state = {name: state[name] for name in _empty(config, encoder_only).state_dict()}
    return Pretrained(spec, RANDOM, Path(spec), config, state, encoder_only, torch.float32, None, False, 0, None)


def _read_public(kind: str, where: str, overrides: Mapping[str, Any]) -> Pretrained:
    special = {"dinov3": ("rope_rescale",), "mae": ("table",), "timm": ("rope_rescale", "table")}
    check_names(overrides, (*SIZES, *PUBLIC, *special.get(kind, ())))
    if overrides.get("encoder_only") is False:
        raise WeightsError(f"'{where}' is used without a decoder, but encoder_only is False")
    found = read_public(kind, where, overrides)
    sizes = {name: overrides[name] for name in SIZES if name in overrides}
    config = _config(found.path, {**layout.sizes_by_shape(found.state), **found.sizes, **sizes})
    state, options = fold(found.state, found.options, bool(overrides.get("trainable")))
    if "patch_size" in sizes:
        state = _resampled(found.path, state, config)
    if "rope_embed.periods" not in state:
        state["rope_embed.periods"] = _rope(config, "rope_embed.periods").periods
    state = _fitting(found.path, state, config, True, f"the {kind} encoder", options)
    about = torch.float32, None, False, None, found.image_size
    return Pretrained("", found.kind, found.path, config, state, True, *about, options)


def _config(path: Path, sizes: Mapping[str, Any]) -> ModelConfig:
    try:
        return ModelConfig(**sizes)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"'{path}' does not hold an encoder of valid sizes ({error})") from None


def _read_own(where: str, overrides: Mapping[str, Any]) -> Pretrained:
    check_names(overrides, (*SIZES, *OWN))
    saved = read_saved(expand_user(where), _ema(overrides.get("ema", "auto")))
    if not saved.parameters_only and (kind := kind_of(saved)):
        raise WeightsError(f"'{saved.path}' does not hold a MuM: it is a {kind}: write {kind}:{where}")
    state = layout.find_state(saved.path, saved.tree, overrides.get("key"))
    encoder = {name: tensor for name, tensor in state.items() if not name.startswith(layout.DECODER)}
    if overrides.get("encoder_only") is False and len(encoder) == len(state):
        raise WeightsError(f"'{saved.path}' holds an encoder without a decoder, but encoder_only is False")
    encoder_only = bool(overrides.get("encoder_only")) or len(encoder) == len(state)
    state = encoder if encoder_only else state
    sizes = {name: overrides[name] for name in SIZES if name in overrides}
    config = _config(saved.path, {**layout.sizes_by_shape(state), **saved.sizes, **sizes})
    if encoder_only and "patch_size" in sizes:
        state = _resampled(saved.path, state, config)
    periods, norm = state.get("rope_embed.periods"), state.get("norm.weight")
    rounded = periods is not None and periods.dtype == torch.bfloat16
    found = torch.bfloat16 if rounded and (norm is None or norm.dtype != torch.bfloat16) else torch.float32
    rope_dtype = _dtype(overrides.get("rope_dtype") or found, "rope_dtype")
    if saved.parameters_only:
        names = [name for name in PERIODS if not (encoder_only and "decoder" in name)]
        state = {name: _rope(config, name).periods for name in names} | state
    state |= _exact_periods(state, config, rope_dtype, sizes)
    model = "the stated model" if saved.sizes and not sizes else _preset(config, encoder_only) or "the model"
    state = _fitting(saved.path, state, config, encoder_only, model)
    about = saved.step, saved.ema, saved.frames, saved.image_size
    return Pretrained("", "mum", saved.path, config, state, encoder_only, rope_dtype, *about)


def _resampled(path: Path, state: State, config: ModelConfig) -> State:
    """The state of an encoder with patches of the size in `config`."""
    name, size = "patch_embed.proj.weight", config.patch_size
    kernel = state.get(name)
    if kernel is None or kernel.ndim != 4 or kernel.shape[2:] == (size, size):
        return state
    log.info("'%s': patches of %d px are resampled for %d px", path, kernel.shape[-1], size)
    return {**state, name: layout.resample_patches(kernel, size)}


def _fitting(
    path: Path, state: State, config: ModelConfig, encoder_only: bool, model: str, options: EncoderOptions = DEFAULT
) -> State:
    """The state in the model's order; MismatchError or WeightsError if it does not fit, `model` names it there."""
    expected = _empty(config, encoder_only, options).state_dict()
    missing = [f"{name} {list(like.shape)}" for name, like in expected.items() if name not in state]
    shapes = {n: (list(t.shape), list(expected[n].shape)) for n, t in state.items() if n in expected}
    misshapen = [f"{name} {shape} (expected: {right})" for name, (shape, right) in shapes.items() if shape != right]
    if missing or misshapen or len(shapes) < len(state):
        extra = [name for name in state if name not in expected]
        raise MismatchError(f"'{path}' does not hold {model}", missing, extra, misshapen)
    state = {name: state[name] for name in expected}
    if odd := [n for n, t in state.items() if t.layout != torch.strided or t.is_meta or not t.is_floating_point()]:
        raise WeightsError(f"'{path}' has weights that are not dense floating-point numbers: {some_names(odd)}")
    return state


def build(
    pretrained: Pretrained, device: torch.device | str = "cpu", dtype: torch.dtype | str = torch.float32
) -> Encoder | MuM:
    """The model of weights; arguments as in `load_pretrained`. WeightsError for an unusable dtype or device."""
    dtype = _dtype(dtype, "dtype")
    model = _empty(pretrained.config, pretrained.encoder_only, pretrained.options)
    for parameter in model.parameters():  # not the buffers: positions have a separate precision
        parameter.data = parameter.data.to(dtype)
    model.rope_embed.to(pretrained.rope_dtype)
    try:
        model = model.to_empty(device=device)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(f"device '{device}' cannot be used ({first_line(error)})") from None
    model.load_state_dict(pretrained.state)
    model.about = pretrained.about
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


def _empty(config: ModelConfig, encoder_only: bool, options: EncoderOptions = DEFAULT) -> Encoder | MuM:
    with torch.device("meta"):
        return Encoder(config, options) if encoder_only else MuM(config)

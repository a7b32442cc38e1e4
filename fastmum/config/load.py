"""From a YAML file and words of the command line to a checked configuration, or one line that says what is wrong."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastmum.attention import BACKENDS
from fastmum.config.schema import COMPILE_MODES, Config, ConfigError
from fastmum.model.masking import num_visible


class Key(NamedTuple):
    """One key of the configuration, as `--help` shows it."""

    name: str
    kind: str
    default: Any
    meaning: str


def load_config(file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, then a YAML file, then `key.sub=value` overrides.

    Raises:
        ConfigError: missing file, unknown key, wrong type or a value out of range, with the key, the nearest valid
            key and the file.
    """
    config = OmegaConf.structured(Config)
    if file is not None:
        config = _merge(config, _read(Path(file)), source=str(file))
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{word}' on the command line is not of the form key.sub=value")
        try:
            given = OmegaConf.from_dotlist([word])
        except Exception:
            raise ConfigError(f"'{value}' for {key} on the command line is not valid YAML") from None
        config = _merge(config, given, source="the command line")
    try:
        typed = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    _check_values(typed)
    return typed


def describe_keys(section: type = Config, prefix: str = "") -> Iterator[Key]:
    """Every key with its type, default and meaning, in the order of the file."""
    instance, hints = section(), get_type_hints(section)
    for entry in dataclasses.fields(section):
        value, name = getattr(instance, entry.name), f"{prefix}{entry.name}"
        if dataclasses.is_dataclass(value):
            yield from describe_keys(type(value), f"{name}.")
        else:
            hint = hints[entry.name]
            kind = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
            yield Key(name, kind, value, entry.metadata["meaning"])


def _read(file: Path) -> DictConfig:
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [f.name for f in file.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean '{file.parent / near[0]}'?" if near else ""
        raise ConfigError(f"configuration file '{file}' does not exist{hint}")
    try:
        content = OmegaConf.load(file)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"'{file}' is not valid YAML: {reason}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"'{file}' must hold sections of keys ({', '.join(_sections())}), not a list")
    return content


def _merge(config: DictConfig, given: DictConfig, source: str) -> DictConfig:
    keys = {key.name: key for key in describe_keys()}
    for name, value in _leaves(given, tables={name for name, key in keys.items() if isinstance(key.default, dict)}):
        if name in _sections():
            if value is None:  # a section whose keys are all commented out
                continue
            raise ConfigError(f"'{name}' in {source} is {value!r}, but is a section: it takes keys, not a value")
        if name not in keys:
            near = difflib.get_close_matches(name, keys, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown key '{name}' in {source}; the nearest valid key is '{near}'")
        if isinstance(value, bool) and keys[name].kind == "str":
            value = "on" if value else "off"  # YAML takes these words for booleans
        try:
            config = OmegaConf.merge(config, _nested(name, value))
        except OmegaConfBaseException as error:
            if isinstance(value, dict) and error.full_key != name:  # a key of the user's own
                raise ConfigError(
                    f"'{error.full_key}' in {source} is {OmegaConf.select(given, error.full_key)!r}, "
                    "but must be a number"
                ) from None
            raise ConfigError(f"'{name}' in {source} is {value!r}, but must be {keys[name].kind}") from None
    return config


def _leaves(given: DictConfig, tables: Set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values; what `tables` names holds keys of the user's own and stays whole."""
    for name, value in OmegaConf.to_container(given, resolve=False).items():
        if isinstance(value, dict) and f"{prefix}{name}" not in tables:
            yield from _leaves(OmegaConf.create(value), tables, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _sections() -> list[str]:
    names = [key.name.rpartition(".")[0] for key in describe_keys()]
    return list(dict.fromkeys(names))


def _check_values(config: Config) -> None:
    """Bounds that a type cannot express.

    Raises:
        ConfigError: the first value out of bounds.
    """
    data, optim, train, model = config.data, config.optim, config.train, config.model
    sizes = config.model_config
    low_high = {"data.views": data.views, "data.crop_scale": data.crop_scale, "data.crop_aspect": data.crop_aspect}
    for key, pair in low_high.items():
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise ConfigError(f"{key} is {pair}, but must be [fewest, most] with 0 < fewest <= most")
    own_data = data.root is not None or data.manifests  # the embedded scenes are then not rendered
    rules = [
        ("data.views", data.views, data.views[1] <= data.frames_per_batch, "at most data.frames_per_batch"),
        ("data.crop_scale", data.crop_scale, data.crop_scale[1] <= 1, "at most 1"),
        ("data.image_size", data.image_size, data.image_size > 0 and data.image_size % sizes.patch_size == 0,
         f"a positive multiple of the patch size {sizes.patch_size}"),
        ("data.flip", data.flip, 0 <= data.flip <= 1, "between 0 and 1"),
        ("data.held_out", data.held_out, 0 <= data.held_out < 1, "at least 0 and below 1"),
        ("data.imagenet_share", data.imagenet_share, 0 <= data.imagenet_share <= 1, "between 0 and 1"),
        *((f"data.weights.{name}", weight, weight >= 0, "at least 0") for name, weight in data.weights.items()),
        ("data.workers", data.workers, data.workers >= 1, "at least 1"),
        ("data.cache_gb", data.cache_gb, data.cache_gb >= 0, "at least 0"),
        ("data.scenes.count", data.scenes.count, own_data or data.scenes.count >= 2, "at least 2, as one is held out"),
        ("data.scenes.views", data.scenes.views, own_data or data.scenes.views >= data.views[0],
         "at least the fewest data.views"),
        ("model.attention", model.attention, model.attention in ("auto", *BACKENDS),
         f"one of auto, {', '.join(BACKENDS)}"),
        ("model.compile", model.compile, model.compile in COMPILE_MODES, f"one of {', '.join(COMPILE_MODES)}"),
        ("model.mask_ratio", model.mask_ratio, 0 < model.mask_ratio < 1, "between 0 and 1"),
        ("optim.base_lr", optim.base_lr, optim.base_lr > 0, "positive"),
        ("optim.betas", optim.betas, len(optim.betas) == 2 and all(0 <= b < 1 for b in optim.betas),
         "two numbers in [0, 1)"),
        ("optim.warmup_steps", optim.warmup_steps, optim.warmup_steps >= 0, "at least 0"),
        ("optim.eps", optim.eps, optim.eps > 0, "positive"),
        ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "at least 0"),
        ("run.seed", config.run.seed, config.run.seed >= 0, "at least 0"),
        ("train.threads", train.threads, train.threads >= 0, "at least 0"),
        ("train.steps", train.steps, train.steps >= 1, "at least 1"),
        ("train.precision", train.precision, train.precision in ("bf16", "fp32"), "bf16 or fp32"),
        *((f"train.{name}", getattr(train, name), getattr(train, name) >= 1, "at least 1")
          for name in ("log_every", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_batches",
                       "picture_every")),
    ]  # fmt: skip
    for key, value, fits, allowed in rules:
        if not fits:
            raise ConfigError(f"{key} is {value}, but must be {allowed}")
    try:
        num_visible((data.image_size // sizes.patch_size) ** 2, model.mask_ratio)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None

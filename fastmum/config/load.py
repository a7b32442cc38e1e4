"""From a YAML file and words of the command line to a checked configuration, or one line that says what is wrong."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastmum.config.bounds import check_values
from fastmum.config.schema import Config, ConfigError
from fastmum.errors import FastmumError
from fastmum.resources import find_config


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
        key = _with_section(key)
        try:
            given = OmegaConf.from_dotlist([f"{key}={value}"])
        except Exception:
            raise ConfigError(f"'{value}' for {key} on the command line is not valid YAML") from None
        config = _merge(config, given, source="the command line")
    try:
        typed = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    check_values(typed)
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


def _with_section(key: str) -> str:
    """A key as it is, or the only one with this last name: `precision` is `train.precision`."""
    names = [k.name for k in describe_keys()]
    if key in names or key in _sections() or "." in key:
        return key
    found = [name for name in names if name.rpartition(".")[2] == key]
    if len(found) > 1:
        raise ConfigError(f"'{key}' on the command line may be {' or '.join(found)}: write the section too")
    return found[0] if found else key


def _read(file: Path) -> DictConfig:
    try:
        content = OmegaConf.load(find_config(file))
    except FastmumError as error:
        raise ConfigError(str(error)) from None
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

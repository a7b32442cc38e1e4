"""Read a YAML file and command-line overrides into a checked configuration."""

import dataclasses
import difflib
import operator
from collections.abc import Collection, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fastmum.config.schema import ConfigError, EngineConfig, problem
from fastmum.config.words import read_word, read_yaml, typed
from fastmum.files import expand_user, resource_dir

C = TypeVar("C", bound=EngineConfig)
YAML_ERRORS = (YAMLError, ValueError, RecursionError)


class Key(NamedTuple):
    """A key, as `--help` shows it."""

    name: str
    kind: str
    default: Any
    meaning: str
    bounds: dict[str, Any]


def load_config(file: str | Path | None, overrides: Sequence[str] = (), schema: type[C] | None = None) -> C:
    """Merge the defaults, a YAML file and `key.sub=value` overrides, in this order.

    `schema` is the task's configuration class; None: MuM's `Config`. In `overrides`, a last name that only one section
    has needs no section. ConfigError: missing file, unknown key, wrong type, or a value out of bounds.
    """
    schema = schema or cast(type[C], _mum_config())
    keys = {k.name: k for k in describe_keys(schema)}
    config = OmegaConf.structured(schema)
    if file is not None:
        config = _merge(config, _read(file), keys, source=str(file))
    for word in overrides:
        config = _merge(config, _parse(word, keys), keys, source="the command line")
    try:
        loaded = cast(C, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    for name, k in keys.items():
        value = operator.attrgetter(name)(loaded)
        entries = {f"{name}.{part}": v for part, v in value.items()} if isinstance(value, dict) else {name: value}
        for entry, v in entries.items():
            if allowed := problem(v, **k.bounds):
                raise ConfigError(f"{entry} is {v}, but must be {allowed}")
    loaded.check()
    return loaded


def peek_task(file: str | Path | None, overrides: Sequence[str]) -> str:
    """The value of `run.task`, which decides about the schema."""
    in_file = dict(_leaves(_read(file), ())).get("run.task") if file is not None else None
    given = [value for word in overrides for key, _, value in [word.partition("=")] if key in ("run.task", "task")]
    return given[-1] if given else str(in_file or "mum")


def describe_keys(section: type | None = None, prefix: str = "") -> Iterator[Key]:
    """Every key of a configuration class, in its order; None: MuM's `Config`."""
    section = section or _mum_config()
    instance, hints = section(), get_type_hints(section)
    for entry in dataclasses.fields(section):
        value, name = getattr(instance, entry.name), f"{prefix}{entry.name}"
        if dataclasses.is_dataclass(value):
            yield from describe_keys(type(value), f"{name}.")
        else:
            hint = hints[entry.name]
            kind = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
            kind = kind.replace(" | None", " or null")
            yield Key(name, kind, value, entry.metadata["meaning"], entry.metadata["bounds"])


def settings(config: EngineConfig) -> dict[str, Any]:
    """The values of all keys by their full names."""
    return {k.name: operator.attrgetter(k.name)(config) for k in describe_keys(type(config))}


def _mum_config() -> type[EngineConfig]:
    from fastmum.config.mum import Config  # imports torch

    return Config


def config_names() -> list[str]:
    """Names of the installed configurations, such as "quickstart" and "evidence/mum"."""
    folder = resource_dir("configs")
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


def find_config(name_or_path: str | Path) -> Path:
    """An existing file, or the installed configuration of that name; ConfigError if there is neither."""
    path = expand_user(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        found = path / "config.yaml"
        there = f"; did you mean '{found}'?" if found.is_file() else ""
        raise ConfigError(f"configuration file '{path}' is a folder, but a YAML file is expected{there}")
    installed = config_names()
    if path.as_posix() in installed:
        return resource_dir("configs") / f"{path}.yaml"
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], n=1)
    nearest = [str(path.parent / near[0])] if near else difflib.get_close_matches(str(path), installed, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    raise ConfigError(f"configuration file '{path}' does not exist{hint} (installed ones: {', '.join(installed)})")


def _parse(word: str, keys: dict[str, Key]) -> dict[str, Any]:
    """One `key=value` of the command line; `precision` is completed to `train.precision`."""
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise ConfigError(f"'{word}' on the command line is not of the form key.sub=value")
    if name not in _sections(keys) and "." not in name:
        found = [full for full in keys if full.rpartition(".")[2] == name]
        if len(found) > 1:
            raise ConfigError(f"'{name}' on the command line may be {' or '.join(found)}: write the section too")
        name = found[0] if found else name
    for table in _tables(keys):
        if name.startswith(f"{table}."):  # an entry, whose name may have dots
            return {table: {name.removeprefix(f"{table}."): read_word(value, _entry_kind(keys[table].kind))}}
    try:
        return {
            name: read_word(value, keys[name].kind if name in keys else "dict" if name in _sections(keys) else "str")
        }
    except YAML_ERRORS:
        raise ConfigError(f"'{value}' for {name} on the command line is not valid YAML") from None


def _read(file: str | Path) -> dict[str, Any]:
    path = find_config(file)
    try:
        content = read_yaml(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"configuration file '{file}' cannot be read ({error.strerror})") from None
    except YAML_ERRORS as error:
        raise ConfigError(f"'{file}' is not valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(content, dict):
        return content
    if not content:
        return {}
    raise ConfigError(f"'{file}' must hold sections of keys, not a list or a word")


def _merge(config: DictConfig, given: dict[str, Any], keys: dict[str, Key], source: str) -> DictConfig:
    nested: dict[str, Any] = {}
    for name, value in _leaves(given, _tables(keys)):
        if name in _sections(keys):
            if not value:  # a section whose keys are all commented out
                continue
            raise ConfigError(f"'{name}' in {source} is {value!r}, but is a section: it takes keys, not a value")
        if name not in keys:
            near = difflib.get_close_matches(name, keys, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown key '{name}' in {source}; the nearest valid key is '{near}'")
        if isinstance(value, dict):  # a table
            kind = _entry_kind(keys[name].kind)
            parts: Any = {str(part): _typed(v, kind, f"{name}.{part}", source) for part, v in value.items()}
        else:
            parts = _typed(value, keys[name].kind, name, source)
        *sections, last = name.split(".")
        reduce(lambda inner, part: inner.setdefault(part, {}), sections, nested)[last] = parts
    try:
        return cast(DictConfig, OmegaConf.merge(config, nested))
    except OmegaConfBaseException as error:  # a wrong ${...}
        raise ConfigError(f"'{error.full_key}' in {source}: {str(error).splitlines()[0]}") from None


def _typed(value: Any, kind: str, name: str, source: str) -> Any:
    try:
        return typed(value, kind)
    except ConfigError as error:
        raise ConfigError(f"'{name}' in {source}: {error}") from None
    except ValueError:
        expected = "a number" if kind == "float" else kind
        raise ConfigError(f"'{name}' in {source} is {value!r}, but must be {expected}") from None


def _entry_kind(kind: str) -> str:
    """The kind of the values of a table, "float" of "dict[str, float]"."""
    return kind.removeprefix("dict[str, ").removesuffix("]")


def _tables(keys: dict[str, Key]) -> list[str]:
    return [name for name, k in keys.items() if isinstance(k.default, dict)]


def _leaves(given: dict, tables: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full names and values. A table, whose keys are the user's, stays whole."""
    for name, value in given.items():
        full = f"{prefix}{name}"
        if isinstance(value, dict) and full not in tables:
            yield from _leaves(value, tables, f"{full}.")
        else:
            yield full, value


def _sections(keys: dict[str, Key]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in keys))

"""Typed configuration of a run: `schema` has the keys of every task, `mum` those of MuM, `load` reads and checks."""

from typing import TYPE_CHECKING, Any

from fastmum.config.load import describe_keys, load_config
from fastmum.config.schema import ConfigError, EngineConfig

if TYPE_CHECKING:
    from fastmum.config.mum import Config

__all__ = ["Config", "ConfigError", "EngineConfig", "describe_keys", "load_config"]


def __getattr__(name: str) -> Any:
    if name == "Config":  # imports the model, which the engine does without
        from fastmum.config.mum import Config

        return Config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

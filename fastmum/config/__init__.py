"""Typed configuration of a run: `schema` has the keys of every task, `mum` those of MuM, `load` reads and checks."""

from fastmum.config.load import describe_keys, load_config
from fastmum.config.schema import ConfigError, EngineConfig

__all__ = ["ConfigError", "EngineConfig", "describe_keys", "load_config"]

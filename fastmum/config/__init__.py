"""The typed configuration of a run: `schema` is what can be set, `load` reads and checks it."""

from fastmum.config.load import describe_keys, load_config
from fastmum.config.schema import Config, ConfigError

__all__ = ["Config", "ConfigError", "describe_keys", "load_config"]

"""Overrides of `load_pretrained` on command lines: `--set norm_eps=1e-6`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fastmum.pretrained.errors import WeightsError
from fastmum.pretrained.load import OPTIONS, PLACEMENT, SIZES, check_names


def add_overrides(parser: argparse.ArgumentParser, *aliases: str, more: str = "") -> None:
    """Add the option `--set`.

    Args:
        parser: gets `args.overrides`, for `parse_overrides`.
        aliases: other names of the option.
        more: for the help, what else can be set.
    """
    parser.add_argument(
        "--set", *aliases, action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="what the weights do not tell, as in load_pretrained: norm_eps=1e-6, rope_dtype=float32, key=teacher"
        f"{more}; may be repeated",
    )  # fmt: skip


def parse_overrides(words: Sequence[str], flags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Words of the option as keyword arguments of `load_pretrained`; values as in YAML.

    Args:
        words: of the command line; of one key, the last counts.
        flags: overrides that have a flag of their own, which must be used instead.

    Raises:
        WeightsError: a word without "=", a value that is no YAML, an override that is unknown or has its own flag.
    """
    overrides: dict[str, Any] = {}
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or not key:
            raise WeightsError(f"--set is '{word}', but must be KEY=VALUE")
        try:
            overrides |= OmegaConf.to_container(OmegaConf.from_dotlist([word]))
        except (YAMLError, OmegaConfBaseException):
            raise WeightsError(f"--set is '{word}', but the value cannot be read as YAML") from None
        if key in (flags or {}):
            raise WeightsError(f"--set is '{word}', but {key} has a flag of its own: {flags[key]}")
    check_names(overrides, (*SIZES, *OPTIONS, *PLACEMENT))
    return overrides

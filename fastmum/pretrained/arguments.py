"""Overrides of `load_pretrained` on command lines: `--set norm_eps=1e-6`."""

from __future__ import annotations

import argparse
from typing import Any

from omegaconf import OmegaConf

from fastmum.pretrained.errors import WeightsError


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the option `--set`."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="what the weights do not tell, as in load_pretrained: norm_eps=1e-6, rope_dtype=float32, key=teacher; "
        "may be repeated",
    )  # fmt: skip


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Words of the option as keyword arguments; values as in YAML.

    Raises:
        WeightsError: a word without "=".
    """
    for word in words:
        if not word.partition("=")[0] or "=" not in word:
            raise WeightsError(f"--set is '{word}', but must be KEY=VALUE")
    return OmegaConf.to_container(OmegaConf.from_dotlist(words))

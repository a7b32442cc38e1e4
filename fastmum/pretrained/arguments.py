"""Weights on command lines: kinds of specs, and overrides of `load_pretrained`: `--set norm_eps=1e-6`."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from yaml import YAMLError

from fastmum.config.words import read_word, typed
from fastmum.model.config import PRESETS
from fastmum.pretrained.layout import SIZES, WeightsError
from fastmum.pretrained.load import OPTIONS, PLACEMENT, RANDOM, check_names
from fastmum.pretrained.public import KINDS

_KINDS = {
    "PATH": "a run, a checkpoint, an export or a released file of MuM", **KINDS,
    RANDOM: f"an untrained model to compare with: {', '.join(PRESETS)}",
}  # fmt: skip
ARGUMENTS = {"PATH": "", "timm": ":NAME", RANDOM: ":PRESET"}
SPECS = "W is one of\n" + "\n".join(f"  {k + ARGUMENTS.get(k, ':PATH'):14} {v}" for k, v in _KINDS.items())
FLOATS, BOOLS = ("norm_eps", "rope_rescale"), ("encoder_only", "trainable")


def add_overrides(parser: argparse.ArgumentParser, *aliases: str, more: str = "") -> None:
    """Add the option `--set`, with further names, which fills `args.overrides`; `more` is appended to its help."""
    parser.add_argument(
        "--set", *aliases, action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="an override of load_pretrained, such as norm_eps=1e-6, key=teacher, ema=off, table=sincos, num_heads=12"
        f"{more}; may be repeated",
    )  # fmt: skip


def parse_overrides(words: Sequence[str], flags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Keyword arguments of `load_pretrained` from words KEY=VALUE; the last word of a key counts.

    WeightsError for invalid words, and overrides that are unknown or in `flags`, which names the flag to use instead.
    """
    overrides, flags = dict[str, Any](), flags or {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise WeightsError(f"--set is '{word}', but must be KEY=VALUE")
        if key in flags:
            raise WeightsError(f"--set is '{word}', but {key} has a separate flag: {flags[key]}")
        check_names([key], (*SIZES, *OPTIONS, *PLACEMENT))
        whole = key in SIZES or key == "seed"
        kind = "float" if key in FLOATS else "bool" if key in BOOLS else "int" if whole else "str"
        try:
            overrides[key] = typed(read_word(value, kind), kind)
        except (YAMLError, ValueError):
            raise WeightsError(f"--set is '{word}', but the value must be {kind}") from None
    return overrides

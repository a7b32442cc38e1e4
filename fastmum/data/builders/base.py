"""What a builder is: how the independent parts of a data set are found, and the sequences of one part.

Parts (scenes, categories, whatever lies apart on disk) may be read in any order by any number of processes; the
manifest holds their sequences in the order of `parts`, so it is the same whatever the number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fastmum.data.manifest import SequenceRecord

RULES = ("paper", "released")


class Option(NamedTuple):
    """One option of a builder, `--min-frames` for the name `min_frames`.

    Args:
        default: its type is the option's; None for a rule's own value, which `kind` then gives the type of.
        meaning: one line for `--help`.
        kind: type of a given value; None is that of the default.
        least: smallest value allowed.
        most: largest value allowed.
        choices: values allowed, none for any.
    """

    default: Any
    meaning: str
    kind: Callable[[str], Any] | None = None
    least: float | None = None
    most: float | None = None
    choices: tuple[Any, ...] = ()


class Options(SimpleNamespace):
    """What a builder was asked for: `rule`, `seed`, `out` (path of the manifest) and its own options by name."""

    rule: str
    seed: int
    out: Path

    def rng(self, part: str) -> np.random.Generator:
        """Random numbers of one part: a function of the seed and the part's name alone."""
        digest = hashlib.sha256(part.encode(errors="surrogateescape")).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little")])


@dataclass(frozen=True)
class Builder:
    """A data set that `python -m fastmum.data.build` knows.

    Args:
        layout: what lies below --root, in one line.
        paper: the rule, in a few words.
        parts: names of the parts found below a root, in order; none where the layout is another.
        sequences: those of one part; must be picklable (a function of a module), as must what it returns.
        released: what the authors' released script does instead, None where that is the same.
        options: its own, by name.
        begin: called once with the root and the options before anything is read (looks for packages, folders).
        root: folder that the frames' paths begin at, None for --root itself.
    """

    layout: str
    paper: str
    parts: Callable[[Path, Options], Sequence[str]]
    sequences: Callable[[Path, str, Options], Iterable[SequenceRecord]]
    released: str | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    begin: Callable[[Path, Options], None] | None = None
    root: Callable[[Path, Options], Path] | None = None

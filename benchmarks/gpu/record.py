"""The findings of a stage, in a JSON file that is replaced after every row: a stage that is killed leaves its rows."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Record:
    """Rows, efficiencies and a headline.

    Args:
        file: where they are written.

    Attributes:
        rows: one dictionary per measurement; those with the same keys are a table of the page.
        efficiency: class of `benchmarks.offline.efficiency` -> shares of the peak, all that were measured.
        notes: paragraphs of the page, as Markdown.
        headline: the stage's result in a line; the last row until it is set.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []
        self.efficiency: dict[str, list[float]] = {}
        self.notes: list[str] = []
        self.headline = ""
        self.write()

    def row(self, **values: Any) -> None:
        """Add a row, print it and write the file."""
        self.rows.append(values)
        print("  ".join(f"{name} {shown(value)}" for name, value in values.items()), flush=True)
        self.write()

    def share(self, kind: str, share: float | None) -> None:
        """Add a share of the peak to a class; None: the peak is unknown."""
        if share is not None:
            self.efficiency.setdefault(kind, []).append(share)

    def write(self) -> None:
        """Replace the file."""
        content = {k: v for k, v in vars(self).items() if k != "file"}
        write_json(self.file, content)


def shown(value: Any) -> str:
    """A value of a row, as it is printed and as it is in tables."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(file: Path, content: Any) -> None:
    """Replace a JSON file as a whole. Not by `fastmum.files`, whose packages may be missing on a bare machine."""
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(partial, file)


def stage_main(about: str | None, measure: Callable[[Record, bool, list[str]], bool | None]) -> int:
    """The command line of a stage; returns the exit code, 1 if `measure` returns False.

    Args:
        about: docstring of the stage's module.
        measure: gets the record, whether sizes are small, and further words.
    """
    return run_stage(about, measure, sys.argv[1:])


def run_stage(
    about: str | None, measure: Callable[[Record, bool, list[str]], bool | None], argv: Sequence[str]
) -> int:  # fmt: skip
    """As `stage_main`, with the words of the command line."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="for the findings")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a CPU too")
    parser.add_argument("words", nargs="*", help="settings of fastmum, key.sub=value, where the stage has a model")
    args = parser.parse_intermixed_args(argv)
    record = Record(args.out)
    sound = measure(record, args.small, args.words)
    record.write()
    return 1 if sound is False else 0

"""The page of results as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.gpu.record import shown
from benchmarks.gpu.stages import STAGES

MACHINE = {"gpu": "GPU", "capability": "architecture", "driver": "driver", "versions": "versions", "commit": "commit"}


def page_name(gpu: str) -> str:
    """File name of the page: NVIDIA H200 -> BENCHMARKS-h200.md."""
    words = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia")).strip("-")
    return f"BENCHMARKS-{words}.md"


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """Machine, a line per stage, shares of the peak, then the rows of each stage."""
    machine, stages = results["machine"], results["stages"]
    yield from (f"# The first hour on {machine['gpu']}", "")
    yield from ("Written by `python -m benchmarks.gpu` after every stage. Times are the GPU's, medians, where no other "
                "device or statistic is named.", "")  # fmt: skip
    if machine["small"]:
        yield from ("**Tiny sizes (`--small`): that it works, not how fast.**", "")
    about = {title: machine.get(key, "") for key, title in MACHINE.items()} | {"date": results["date"]}
    yield from markdown_table(["", ""], [[title, value] for title, value in about.items() if value])
    yield from ("", "## Stages", "")
    names = [name for name in STAGES if name in stages]
    rows = [[f"`{name}`", stages[name]["state"], stages[name]["seconds"], summary(stages[name])] for name in names]
    yield from markdown_table(["stage", "state", "seconds", "result"], rows)
    missing = [name for name in STAGES if name not in stages]
    if missing:
        yield from ("", f"Not run: {', '.join(missing)}.")
    if results["efficiency"]:
        yield from ("", "## Shares of the peak", "")
        yield from ("`python -m benchmarks.offline --efficiency results.json` predicts with them.", "")
        shares = [[kind, *(f"{share[of]:.1%}" for of in ("low", "likely", "high"))]
                  for kind, share in results["efficiency"].items()]  # fmt: skip
        yield from markdown_table(["class", "least", "median", "most"], shares)
    for name in names:
        if stages[name]["rows"] or stages[name]["notes"]:
            yield from ("", f"## {STAGES[name].title}")
            yield from row_tables(stages[name]["rows"])
            for note in stages[name]["notes"]:
                yield from ("", note)


def summary(stage: Mapping[str, Any]) -> str:
    """The headline, and why the stage did not end well."""
    return "; ".join(text for text in (stage["headline"], stage["reason"]) if text)


def row_tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One table for consecutive rows with the same keys."""
    for keys, some in groupby(rows, key=tuple):
        yield ""
        headings = [key.replace("_", " ") for key in keys]
        yield from markdown_table(headings, [list(row.values()) for row in some])


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """A table; `|` and line breaks in cells are escaped."""
    yield "| " + " | ".join(headings) + " |"
    yield "|" + "---|" * len(headings)
    for row in rows:
        yield "| " + " | ".join(re.sub(r"\s+", " ", shown(cell)).replace("|", "\\|") for cell in row) + " |"

"""A page of Markdown from what the benchmarks measured: `python -m benchmarks.report RESULT.json ... [--out FILE]`.

The JSON is that of `pytest benchmarks/ --benchmark-only --benchmark-json=RESULT.json`, or of several runs of parts;
plots go beside the page, into images/ and a folder of its name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.plots import draw_ratios
from benchmarks.projection import ProjectionError, projection_tables, read_predictions
from benchmarks.results import FASTMUM, HEADINGS, Result, grouped, results_of, rows, write

HOW = "write it with pytest benchmarks/ --benchmark-only --benchmark-json=FILE"
OFFLINE_MARK = "<!-- predictions: python -m benchmarks.offline --json > FILE, then --offline FILE -->"

# Group -> what a reader should know of it.
ABOUT = {
    "training step": "The same weights, frames and masks; losses of two steps agree before anything is timed. The "
    "reference computes what the released code does: every patch embedded and predicted, rotary tables for every head, "
    "autocast, AdamW of PyTorch. What fastmum does differently is in the phases. On a CPU PyTorch's default AdamW is "
    "its loop over parameters, where fastmum calls PyTorch's fused one: `AdamW(fused=True)` would be about even. Also "
    "on a CPU fastmum's trainer tells glibc to keep freed memory, which the reference's process does not.",
    "kernels": "What stands between the matrix products, each against its plain form in PyTorch. Bytes are by formula, "
    "every input and output once; GB/s and FLOP/s are fastmum's. On a CPU `adamw_` is PyTorch's fused AdamW against "
    "its default there, the loop over parameters: `AdamW(fused=True)` would be about even.",
    "attention": "Backends that are available here against PyTorch's attention: one call for equal sequences, a call "
    "for each ragged one. FLOP/s are fastmum's, of scores and weighted values.",
    "ragged batches": "fastmum against itself: sequences of different length against equal ones, per operation of the "
    "model. 1 is no cost.",
    "peak memory": "Of a fresh process that imports, builds the model and trains.",
    "loader": "CPU time from a JPEG to a crop of 256 pixels, of all threads and worker processes, against Pillow and "
    "torchvision's transforms in a DataLoader. Crops agree within two grey levels. The reference "
    "returns float32, normalised; fastmum uint8, which its model normalises on the device.",
    "sampler": "Time of planning, where fastmum's plan also holds crops and flips; and what full and level batches "
    "gain over the paper's sampler on many ranks. The latter is simulated: frames a second that all ranks together "
    "train on where each does 10^12 operations a second (1 TFLOP/s) of the model's products, forward and backward, and "
    "a step takes as long as its slowest rank. At x TFLOP/s a rank it is x times as many, and the ratio the same.",
    "start-up": "A fresh process each time.",
    "checkpoint": "Weights and moments on the disk of the temporary folder, of a model that trains on the CPU on any "
    "machine. fastmum writes in the background, and verifies checksums when it loads.",
    "training loop": "What the loop adds to forward, backward and update.",
}  # fmt: skip
ORDER = list(ABOUT)


class ReportError(ValueError):
    """A page that cannot be made; the message is one line for the user."""


def read_results(path: Path) -> dict[str, Any]:
    """What pytest-benchmark wrote.

    Raises:
        ReportError: the file is missing, no JSON, or not of these benchmarks.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"'{path}' cannot be read ({error.strerror}); {HOW}") from None
    except ValueError as error:
        raise ReportError(f"'{path}' is no JSON ({error}); {HOW}") from None
    if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list) or "machine_info" not in data:
        raise ReportError(f"'{path}' is not of pytest-benchmark; {HOW}")
    if "fastmum" not in data["machine_info"]:
        raise ReportError(f"'{path}' holds other benchmarks than fastmum's; {HOW}")
    return data


def joined(paths: Sequence[Path]) -> dict[str, Any]:
    """Runs of parts as one; the machine and the date are those of the first.

    Raises:
        ReportError: as `read_results`, or sizes or devices that differ.
    """
    first, *others = [read_results(path) for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        for key in ("sizes", "device"):
            ours, theirs = (data["machine_info"]["fastmum"].get(key) for data in (first, other))
            if ours != theirs:
                raise ReportError(f"'{path}' is of another {key} ({theirs}) than '{paths[0]}' ({ours})")
        first["benchmarks"] += other["benchmarks"]
    return first


def write_report(
    data: Mapping[str, Any], out: Path, notes: Sequence[str] = (), predictions: Sequence[dict[str, Any]] = ()
) -> None:
    """Write the page and its plots.

    Args:
        data: of `read_results`.
        out: the page.
        notes: paragraphs behind the table of the machine.
        predictions: of `read_predictions`, one for each GPU.

    Raises:
        ReportError: no duels, files that cannot be written, or no matplotlib.
    """
    try:
        results = results_of(data["benchmarks"])
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"the results cannot be used ({error!r}); {HOW}") from None
    groups = grouped(results)
    if not groups:
        raise ReportError(f"there are no results to compare; {HOW}")
    images = out.parent / "images" / out.stem.lower()
    try:
        images.mkdir(parents=True, exist_ok=True)
        lines = [*_head(data), *(f"{note}\n" for note in notes)]
        for group in sorted(groups, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
            plot = images / f"{group.replace(' ', '-')}.svg"
            draw_ratios(groups[group], plot)
            lines += _section(group, groups[group], plot.relative_to(out.parent).as_posix())
        lines += _others(data["benchmarks"])
        lines += _predicted(predictions)
        out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    except ImportError:
        raise ReportError("plots need matplotlib: pip install 'fastmum[dev]'") from None
    except OSError as error:
        raise ReportError(f"'{error.filename or out}' cannot be written ({error.strerror})") from None


def write_notes(out: Path, notes: Sequence[str], predictions: Sequence[dict[str, Any]] = ()) -> None:
    """Write a page of paragraphs alone, where the benchmarks left no results.

    Args:
        out, notes, predictions: of `write_report`.

    Raises:
        ReportError: the page cannot be written.
    """
    lines = ["# Benchmarks", "", *(f"{note}\n" for note in notes), *_predicted(predictions)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    except OSError as error:
        raise ReportError(f"'{error.filename or out}' cannot be written ({error.strerror})") from None


def _predicted(predictions: Sequence[dict[str, Any]]) -> list[str]:
    return [line for each in predictions for line in projection_tables(each)] or [OFFLINE_MARK]


def _head(data: Mapping[str, Any]) -> list[str]:
    machine = data["machine_info"]
    ours, cpu = machine["fastmum"], machine.get("cpu", {})
    quick = " --quick" if ours.get("quick") else ""
    about = {
        "device": ours["device"],
        "CPU": f"{ours['capability']}, as PyTorch uses it",
        "processor": f"{cpu.get('brand_raw', machine.get('processor', 'unknown'))}, {cpu.get('count', '?')} cores seen",
        "system": f"{machine.get('system', '')} {ours['machine'].split()[0]}",
        "versions": f"torch {ours['torch']}, Python {machine.get('python_version', '')}"
        + (f", CUDA {ours['cuda']}" if ours.get("cuda") else ""),
        "commit": ours["commit"],
        "date": str(data.get("datetime", ""))[:10],
        "sizes": ours["sizes"],
    }
    return [
        "# Benchmarks",
        "",
        "How much faster than the released model in plain PyTorch is fastmum, and where? Written by `python -m"
        " benchmarks.report` from",
        "",
        "```",
        f"pytest benchmarks/ --benchmark-only{quick} --benchmark-json=result.json",
        "python -m benchmarks.report result.json",
        "```",
        "",
        "which is what to run for numbers of your own machine. Contestants get the same inputs and are timed by turns."
        " Before that, results are compared: those of the kernels, attention, the training step, the loader and the"
        " checkpoint. Of start-up and peak memory only the first loss is checked, for plausibility; ragged batches and"
        " the training loop are fastmum against itself, and what samplers draw is random. Ratios are taken round by"
        " round: median, and in brackets the quartiles, or the least and the most of fewer than 4 rounds. Above 1"
        " fastmum is better.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in about.items()),
        "",
    ]


def _section(group: str, results: Sequence[Result], plot: str) -> list[str]:
    cells = rows(results)
    # Columns that nobody filled are left out.
    used = [i for i in range(len(HEADINGS)) if i == 0 or any(row[i] for row in cells)]
    lines = [f"## {group[0].upper()}{group[1:]}", ""]
    lines += [ABOUT[group], ""] if group in ABOUT else []
    lines += ["| " + " | ".join(HEADINGS[i] for i in used) + " |", "|" + "---|" * len(used)]
    lines += ["| " + " | ".join(row[i] for i in used) + " |" for row in cells]
    return [*lines, "", f"![{group}: ratios]({plot})", ""]


def _others(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What fastmum takes for work that the reference has nothing like."""
    others = [entry for entry in entries if "contestant" not in entry["extra_info"]]
    if not others:
        return []
    lines = ["## fastmum alone", "", "| | median | least to most | rounds | |", "|---|---|---|---|---|"]
    for entry in others:
        stats, info = entry["stats"], entry["extra_info"]
        spread = f"{write(stats['min'], 's')} to {write(stats['max'], 's')}"
        note = ", ".join(f"{key}: {value}" for key, value in info.items())
        name = entry["fullname"].removeprefix("benchmarks/test_").replace(".py::test_", ": ").replace("_", " ")
        lines.append(f"| {name} | {write(median(stats['data']), 's')} | {spread} | {len(stats['data'])} | {note} |")
    return [*lines, ""]


def summary(results: Sequence[Result]) -> str:
    """The figure that everybody asks for, in a line."""
    for result in results:
        if (result.group, result.what) == ("training step", "whole step") and (ratio := result.ratio()):
            return f"training step: {result.value(FASTMUM)}, {ratio} times the reference's speed"
    return f"{len(results)} comparisons"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="of --benchmark-json")
    parser.add_argument("--out", type=Path, default=Path("docs/BENCHMARKS.md"), help="the page (%(default)s)")
    parser.add_argument(
        "--offline", type=Path, action="append", default=[], metavar="FILE.json",
        help="of python -m benchmarks.offline --json; repeatable, for several GPUs",
    )  # fmt: skip
    parser.add_argument(
        "--note", action="append", default=[], metavar="TEXT", help="a paragraph for the page; repeatable"
    )
    args = parser.parse_args(argv)
    try:
        data = joined(args.results)
        predictions = [read_predictions(file) for file in args.offline]
        write_report(data, args.out, args.note, predictions)
    except (ReportError, ProjectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {summary(results_of(data['benchmarks']))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

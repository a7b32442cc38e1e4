"""Write docs/BENCHMARKS.md from results: `python -m benchmarks.report RESULT.json ... [--out FILE]`.

RESULT.json is written by `pytest benchmarks/ --benchmark-only --benchmark-json=RESULT.json`, in one or several runs.
Plots are written next to the page, into images/<name of the page>.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.projection import ProjectionError, projection_tables, read_predictions
from benchmarks.results import COMPILED, FASTMUM, HEADINGS, REFERENCE, Result, grouped, results_of, rows, write
from fastmum.errors import FastmumError, run_command

HOW = "write it with pytest benchmarks/ --benchmark-only --benchmark-json=FILE"
OFFLINE_MARK = "<!-- predictions: python -m benchmarks.offline --json > FILE, then --offline FILE -->"

# Group -> explanation on the page.
ABOUT = {
    "training step": "The same weights, frames and masks; the losses of two steps agree before anything is timed. The "
    "reference computes what the released code does: it embeds and predicts every patch, computes rotary tables for "
    "every head, and uses autocast and PyTorch's AdamW. The phases show where fastmum differs. On a CPU PyTorch's "
    "default AdamW loops over parameters, while fastmum calls PyTorch's fused one: `AdamW(fused=True)` would be about "
    "on par. Also on a CPU, fastmum's trainer tells glibc to keep freed memory; the reference's process does not.",
    "kernels": "The operations between the matrix products, each against its plain form in PyTorch. Bytes are by "
    "formula, every input and output once; GB/s and FLOP/s are fastmum's. On a CPU `adamw_` is PyTorch's fused AdamW "
    "against its default there, the loop over parameters: `AdamW(fused=True)` would be about on par.",
    "attention": "The backends available here against PyTorch's attention: one call for equal sequences, one call per "
    "sequence for ragged ones. FLOP/s are fastmum's, of scores and weighted values.",
    "ragged batches": "fastmum against itself: sequences of different lengths against equal ones, time per operation "
    "of the model. 1 is no overhead.",
    "peak memory": "Peak memory of a fresh process that imports, builds the model and trains.",
    "loader": "CPU time from a JPEG to a crop of 256 pixels, summed over threads and worker processes, against Pillow "
    "and torchvision's transforms in a DataLoader. Crops agree within two grey levels. The reference returns "
    "normalised float32; fastmum returns uint8, which its model normalises on the device.",
    "sampler": "Planning time (fastmum's plan also holds crops and flips), and the gain of full and level batches "
    "over the paper's sampler on many ranks. The gain is simulated: frames per second of all ranks together if each "
    "rank does 10^12 operations per second (1 TFLOP/s) of the model's products, forward and backward, and a step "
    "takes as long as its slowest rank. At x TFLOP/s per rank the frames per second are x times as many and the ratio "
    "is the same.",
    "start-up": "Each round is a fresh process.",
    "checkpoint": "Weights and moments of a model that trains on the CPU on any machine, written to the disk of the "
    "temporary folder. fastmum writes in the background, and verifies checksums when it loads.",
    "training loop": "The time that the loop adds to forward, backward and update.",
}  # fmt: skip
ORDER = list(ABOUT)
COLORS = {REFERENCE: "#2a6fbb", COMPILED: "#c98a1b"}
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.4, 2, 3, 5, 10, 20, 50, 100)


class ReportError(FastmumError):
    """Results that cannot be read, or a page that cannot be written."""


def read_results(path: Path) -> dict[str, Any]:
    """The JSON of pytest-benchmark.

    Raises:
        ReportError: the file is missing, invalid, or of other benchmarks.
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
    """Several runs as one; the machine and the date are the first run's.

    Raises:
        ReportError: as `read_results`, or the sizes or devices differ.
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
        notes: paragraphs after the table of the machine.
        predictions: of `read_predictions`, one for each GPU.

    Raises:
        ReportError: there are no duels, or a file cannot be written.
    """
    try:
        groups = grouped(results_of(data["benchmarks"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"the results cannot be used ({error!r}); {HOW}") from None
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
        _write(out, [*lines, *_others(data["benchmarks"])], predictions)
    except OSError as error:
        raise ReportError(f"'{error.filename or out}' cannot be written ({error.strerror})") from None


def write_notes(out: Path, notes: Sequence[str], predictions: Sequence[dict[str, Any]] = ()) -> None:
    """Write a page of `notes` and `predictions` without results; raises `ReportError`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(out, ["# Benchmarks", "", *(f"{note}\n" for note in notes)], predictions)
    except OSError as error:
        raise ReportError(f"'{error.filename or out}' cannot be written ({error.strerror})") from None


def _write(out: Path, lines: Sequence[str], predictions: Sequence[dict[str, Any]]) -> None:
    predicted = [line for each in predictions for line in projection_tables(each)] or [OFFLINE_MARK]
    out.write_text("\n".join([*lines, *predicted]).rstrip() + "\n", encoding="utf-8")


def draw_ratios(results: Sequence[Result], path: Path) -> None:
    """Draw bars of reference / fastmum and compiled / fastmum on a logarithmic axis as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fastmum", "font.size": 9}
    over = [name for name in (REFERENCE, COMPILED) if any(result.ratio(name) for result in results)]
    height, values = 0.76 / max(1, len(over)), [1.0]
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.0, 1.2 + 0.36 * len(results)), layout="constrained")
        axes = figure.add_subplot()
        for i, name in enumerate(over):
            ratios = [(row, ratio) for row, result in enumerate(results) if (ratio := result.ratio(name))]
            at = [row + (i - (len(over) - 1) / 2) * height for row, _ in ratios]
            lengths = [ratio.median - 1 for _, ratio in ratios]
            around = [[r.median - r.low for _, r in ratios], [r.high - r.median for _, r in ratios]]
            axes.barh(at, lengths, 0.9 * height, left=1, color=COLORS[name], label=f"{name} / fastmum")
            middle = [ratio.median for _, ratio in ratios]
            axes.errorbar(middle, at, xerr=around, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
            values += [value for _, ratio in ratios for value in (ratio.low, ratio.high)]
        low, high = 0.9 * min(values), 1.1 * max(values)
        ticks = [tick for tick in TICKS if low <= tick <= high]
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.axvline(1, color="black", linewidth=0.8)
        names = [result.what if len(result.what) <= 60 else f"{result.what[:59]}…" for result in results]
        axes.set_yticks(range(len(results)), names)
        axes.invert_yaxis()
        axes.set_xlabel("times better than the reference: medians of rounds, with the spread of the table")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


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
        "Speed of fastmum relative to the released model in plain PyTorch. `python -m benchmarks.report` writes this"
        " page:",
        "",
        "```",
        f"pytest benchmarks/ --benchmark-only{quick} --benchmark-json=result.json",
        "python -m benchmarks.report result.json",
        "```",
        "",
        "Run the same for your own machine. All contestants get the same inputs, and their rounds alternate. Results"
        " are compared before anything is timed for kernels, attention, the training step, the loader and the"
        " checkpoint. For start-up and peak memory only the first loss is checked, for plausibility; ragged batches"
        " and the training loop compare fastmum with itself; samplers draw at random. Ratios are computed round by"
        " round: the median, and in brackets the quartiles, or minimum and maximum of fewer than 4 rounds. Above 1"
        " fastmum is better.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in about.items()),
        "",
    ]


def _section(group: str, results: Sequence[Result], plot: str) -> list[str]:
    cells = rows(results)
    used = [i for i in range(len(HEADINGS)) if i == 0 or any(row[i] for row in cells)]  # no empty columns
    lines = [f"## {group[0].upper()}{group[1:]}", ""]
    lines += [ABOUT[group], ""] if group in ABOUT else []
    lines += ["| " + " | ".join(HEADINGS[i] for i in used) + " |", "|" + "---|" * len(used)]
    lines += ["| " + " | ".join(row[i] for i in used) + " |" for row in cells]
    return [*lines, "", f"![{group}: ratios]({plot})", ""]


def _others(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Benchmarks without a reference."""
    others = [entry for entry in entries if "contestant" not in entry["extra_info"]]
    if not others:
        return []
    lines = ["## fastmum only", "", "| | median | least to most | rounds | |", "|---|---|---|---|---|"]
    for entry in others:
        stats, info = entry["stats"], entry["extra_info"]
        spread = f"{write(stats['min'], 's')} to {write(stats['max'], 's')}"
        note = ", ".join(f"{key}: {value}" for key, value in info.items())
        name = entry["fullname"].removeprefix("benchmarks/test_").replace(".py::test_", ": ").replace("_", " ")
        lines.append(f"| {name} | {write(median(stats['data']), 's')} | {spread} | {len(stats['data'])} | {note} |")
    return [*lines, ""]


def summary(results: Sequence[Result]) -> str:
    """The speed of the training step in a line, or the number of comparisons."""
    for result in results:
        if (result.group, result.what) == ("training step", "whole step") and (ratio := result.ratio()):
            return f"training step: {result.value(FASTMUM)}, {ratio} times the reference's speed"
    return f"{len(results)} comparisons"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    add, offline = parser.add_argument, "of python -m benchmarks.offline --json; repeatable, for several GPUs"
    add("results", type=Path, nargs="+", metavar="RESULT.json", help="of --benchmark-json")
    add("--out", type=Path, default=Path("docs/BENCHMARKS.md"), help="the page (%(default)s)")
    add("--offline", type=Path, action="append", default=[], metavar="FILE.json", help=offline)
    add("--note", action="append", default=[], metavar="TEXT", help="a paragraph for the page; repeatable")
    args = parser.parse_args(argv)

    def run() -> None:
        data = joined(args.results)
        try:
            predictions = [read_predictions(file) for file in args.offline]
        except ProjectionError as error:
            raise ReportError(str(error)) from None
        write_report(data, args.out, args.note, predictions)
        print(f"{args.out}: {summary(results_of(data['benchmarks']))}")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

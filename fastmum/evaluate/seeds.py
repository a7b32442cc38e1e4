"""Results of several seeds together: `python -m fastmum.evaluate.seeds DIR [--plots DIR]`.

DIR is a folder of results of `fastmum.evaluate`. Weights whose names differ in a number at the end alone ("mum 0",
"mum 1", ...) are seeds of one; their mean and standard deviation are printed as tables, and drawn where asked.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fastmum.data.errors import DataError
from fastmum.evaluate.folder import Record, make_folder, read
from fastmum.evaluate.table import COMPANY, MATCHERS, NONE, SCORES, TITLES, VIEWS, score_title

SEED = re.compile(r"[ _-]+\d+$")  # at the end of a name

Spread = dict[tuple[str, str], dict[str, list[dict[str, Any]]]]


def by_seed(records: Iterable[Record]) -> Spread:
    """Contents of results by evaluation and set, then by the name without its seed, where there are several.

    Raises:
        DataError: weights that were evaluated differently, which have no mean.
    """
    found: Spread = {}
    for record in records:
        content = record.content
        name = SEED.sub("", content["weights"])
        found.setdefault((content["task"], content["set"]), {}).setdefault(name, []).append(content)
    for weights in found.values():
        _check_alike([content for contents in weights.values() for content in contents])
    return {key: dict(map(_named, weights.items())) for key, weights in found.items()}


def _check_alike(contents: list[dict[str, Any]]) -> None:
    first, *others = ({k: v for k, v in c.get("settings", {}).items() if k != "seed"} for c in contents)
    for other, content in zip(others, contents[1:], strict=True):
        if different := [key for key in first.keys() | other.keys() if first.get(key) != other.get(key)]:
            names = f"'{contents[0]['weights']}' and '{content['weights']}'"
            raise DataError(f"{names} were evaluated with different {', '.join(sorted(different))}: do it alike")


def _named(item: tuple[str, list[dict[str, Any]]]) -> tuple[str, list[dict[str, Any]]]:
    name, contents = item
    return (name if len(contents) > 1 else contents[0]["weights"]), contents


def tables(spread: Spread) -> str:
    """A table of Markdown for each evaluation and set."""
    parts = []
    for (task, name), weights in spread.items():
        columns = _views_columns(weights) if task == "views" else _score_columns(weights)
        still = next((c["no_motion"] for contents in weights.values() for c in contents if "no_motion" in c), None)
        lines = [f"**{MATCHERS[task]}, {TITLES.get(name, name)}**", "", _row(["weights", "seeds", *columns])]
        lines.append("|" + "---|" * (len(columns) + 2))
        if still and task != "views":
            lines.append(_row(["no motion", "", *(f"{still[score]:.1f}" for score in SCORES if score in still)]))
        for each, contents in weights.items():
            lines.append(_row([each, str(len(contents)), *(of(contents) for of in columns.values())]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


Column = Callable[[list[dict[str, Any]]], str]


def _score_columns(weights: dict[str, list[dict[str, Any]]]) -> dict[str, Column]:
    there = next(iter(weights.values()))[0]["scores"]

    def column(score: str) -> Column:
        return lambda contents: _spread([c["scores"].get(score) for c in contents], ".1f")

    return {score_title(score): column(score) for score in SCORES if score in there}


def _views_columns(weights: dict[str, list[dict[str, Any]]]) -> dict[str, Column]:
    """The loss alone, and the change by each number of related and of unrelated views."""
    counts = next(iter(weights.values()))[0]["views"]

    def column(company: str, i: int) -> Column:
        return lambda contents: _spread([c[company][i] - c[company][0] for c in contents], "+.4f")

    columns: dict[str, Column] = {score_title(f"{VIEWS}1"): lambda cs: _spread([c["same"][0] for c in cs], ".4f")}
    for company, label in (("same", "views"), ("other", "unrelated")):
        for i, count in enumerate(counts[1:], 1):
            columns[f"{count} {label}"] = column(company, i)
    return columns


def _spread(values: Sequence[float | None], digits: str) -> str:
    """Mean and standard deviation."""
    there = [value for value in values if value is not None]
    if not there:
        return NONE
    around = f" ± {format(stdev(there), digits.lstrip('+'))}" if len(there) > 1 else ""
    return f"{format(mean(there), digits)}{around}"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(spread: Spread, folder: Path) -> list[Path]:
    """A picture of every evaluation and set: the loss by number of views, or end-point errors, with every seed.

    Raises:
        DataError: matplotlib is not installed, or the folder cannot be written to.
    """
    try:
        import matplotlib
    except ImportError:
        raise DataError("--plots needs matplotlib: pip install 'fastmum[evaluate]'") from None
    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    make_folder(folder)
    files = []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastmum", "font.size": 9}):
        for (task, name), weights in spread.items():
            figure, axes = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
            (_draw_views if task == "views" else _draw_scores)(axes, weights)
            axes.set_title(f"{MATCHERS[task]}, {TITLES.get(name, name)}")
            axes.spines[["top", "right"]].set_visible(False)
            files.append(folder / f"{task}-{name}.svg")
            figure.savefig(files[-1], metadata={"Date": None})
            plt.close(figure)
    return files


def _draw_views(axes: Any, weights: dict[str, list[dict[str, Any]]]) -> None:
    """The change of the loss; a thin line for each seed, a thick one for their mean, dashed for unrelated views."""
    for i, (name, contents) in enumerate(weights.items()):
        counts = contents[0]["views"]
        for company, label in COMPANY.items():
            style = {"color": f"C{i}", "linestyle": "-" if company == "same" else "--"}
            rows = [[loss - content[company][0] for loss in content[company]] for content in contents]
            for row in rows:
                axes.plot(counts, row, linewidth=0.7, alpha=0.5, **style)
            means = [mean(column) for column in zip(*rows, strict=True)]
            axes.plot(counts, means, linewidth=2, marker="o", label=f"{name}, {label}", **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("views shown to the decoder")
    axes.set_ylabel("masked loss, less that of a frame alone")
    axes.legend(frameon=False, fontsize=7)


def _draw_scores(axes: Any, weights: dict[str, list[dict[str, Any]]]) -> None:
    """End-point errors, or recall where there are none: a bar for the mean of the seeds, a dot for each."""
    score = "epe" if "epe" in next(iter(weights.values()))[0]["scores"] else "recall"
    for i, contents in enumerate(weights.values()):
        errors = [value for content in contents if (value := content["scores"][score]) is not None]
        if not errors:
            continue
        axes.bar(i, mean(errors), color=f"C{i}", alpha=0.5, width=0.6)
        axes.plot([i] * len(errors), errors, "o", color=f"C{i}", markersize=4)
    axes.set_xticks(range(len(weights)), list(weights))
    axes.set_ylabel("end-point error, pixels of 448 x 448" if score == "epe" else "recall, percent")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastmum.evaluate.seeds", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="results of fastmum.evaluate (its --out)")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw into this folder, too")
    args = parser.parse_args(argv)
    try:
        spread = by_seed(read(args.folder))
        if not spread:
            raise DataError(f"'{args.folder}' holds no results of fastmum.evaluate")
        print(tables(spread))
        for file in draw(spread, args.plots) if args.plots else ():
            print(file)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

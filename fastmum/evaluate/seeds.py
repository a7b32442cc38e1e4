"""Combine results of several seeds: `python -m fastmum.evaluate.seeds DIR [--plots DIR]`.

DIR is a folder of results of `fastmum.evaluate`. Weights whose names differ only in a final number ("mum 0", "mum 1",
...) are seeds of one model, as docs/recognition.md says. Their means and standard deviations are printed as a table for
each evaluation and one of all and, with --plots, drawn.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from fastmum.data.errors import DataError
from fastmum.errors import run_command, writing
from fastmum.evaluate.overview import overview
from fastmum.evaluate.records import MATCHERS, Record, file_stem, make_folder, read
from fastmum.evaluate.results import (
    COUNTED,
    NONE,
    OTHER_VIEWS,
    SCORES,
    TITLES,
    VIEWS,
    Contents,
    check_same,
    digits,
    markdown,
    mean_sd,
    measured_on,
    models,
    score_title,
    set_of,
)

LEADING = {"epe": "end-point error, pixels of 448 x 448", "recall": "recall, percent", "rmse": "RMSE, metres"}
STYLE: dict[Any, Any] = {  # of plots; a name with $ is text
    "svg.fonttype": "none", "svg.hashsalt": "fastmum", "font.size": 9, "text.parse_math": False
}  # fmt: skip

Spread = dict[tuple[str, str], dict[str, Contents]]  # by (task, set as `set_of` names it), then by name


def by_seed(records: Iterable[Record]) -> Spread:
    """Results by evaluation and set, then by the `models` that the weights are seeds of."""
    measured, found = dict[tuple[str, str], Contents](), Spread()
    for content in (record.content for record in records):
        measured.setdefault((content["task"], set_of(content)), []).append(content)
    for key, contents in measured.items():
        check_same(contents)
        named, found[key] = models(contents), {}
        for content in contents:
            found[key].setdefault(named[content["weights"]], []).append(content)
    return found


def tables(spread: Spread) -> str:
    """A Markdown table for each evaluation and set."""
    parts = []
    for (task, name), weights in spread.items():
        cells = {each: (_view_cells if task == "views" else _score_cells)(seeds) for each, seeds in weights.items()}
        columns = list(dict.fromkeys(column for each in cells.values() for column in each))
        rows = [["weights", "seeds", *columns]]
        for still in [c["no_motion"] for seeds in weights.values() for c in seeds if "no_motion" in c][:1]:
            found = _score_cells([{"scores": still}])
            rows.append(["no motion", "", *(found.get(column, NONE) for column in columns)])
        for each, seeds in weights.items():
            rows.append([each, str(len(seeds)), *(cells[each].get(column, NONE) for column in columns)])
        parts.append(f"**{_title(task, name, weights)}**\n\n{markdown(rows)}")
    return "\n\n".join(parts) + "\n"


def _title(task: str, name: str, weights: dict[str, Contents]) -> str:
    """The evaluation, the set and the number of its pairs."""
    pairs = next((on.pairs for seeds in weights.values() for on in map(measured_on, seeds) if on.pairs), None)
    count = "" if pairs is None else f", {pairs:,}{COUNTED.get(task, ' pairs')}"
    return f"{MATCHERS[task]}, {TITLES.get(name, name)}{count}"


def _score_cells(seeds: Contents) -> dict[str, str]:
    scores = [score for score in SCORES if any(score in content["scores"] for content in seeds)]
    return {
        score_title(score): mean_sd([c["scores"].get(score) for c in seeds], f".{digits(score)}f") for score in scores
    }


def _view_cells(seeds: Contents) -> dict[str, str]:
    cells = {score_title(f"{VIEWS}1"): mean_sd([c["same"][0] for c in seeds], ".4f")}
    for kind, label in (("same", "views"), ("other", "unrelated")):
        for i, count in enumerate(seeds[0]["views"][1:], 1):
            cells[f"{count} {label}"] = mean_sd([c[kind][i] - c[kind][0] for c in seeds], "+.4f")
    return cells


def draw(spread: Spread, folder: Path) -> list[Path]:
    """An SVG of every evaluation and set: losses by number of views, or end-point errors, with every seed."""
    make_folder(folder, "--plots")
    files = []
    for (task, name), weights in spread.items():
        files.append(folder / f"{file_stem(task, name)}.svg")
        with svg_axes(files[-1], title=_title(task, name, weights)) as axes:
            (_draw_views if task == "views" else _draw_scores)(axes, weights)
    return files


@contextlib.contextmanager
def svg_axes(file: Path, **properties: str) -> Iterator[Any]:
    """Axes of matplotlib with these properties, saved as an SVG when the block ends; raises `DataError`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), writing(file, DataError):
        figure = Figure(figsize=(5.4, 3.2), layout="constrained")
        axes = figure.add_subplot(**properties)
        yield axes
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, metadata={"Date": None})


def _draw_views(axes: Any, weights: dict[str, Contents]) -> None:
    """Change of the loss: thin lines for the seeds, thick ones for their mean, dashed ones for unrelated views."""
    for i, (name, seeds) in enumerate(weights.items()):
        counts = seeds[0]["views"]
        for kind, label in OTHER_VIEWS.items():
            style = {"color": f"C{i}", "linestyle": "-" if kind == "same" else "--"}
            rows = [[loss - content[kind][0] for loss in content[kind]] for content in seeds]
            for row in rows:
                axes.plot(counts, row, linewidth=0.7, alpha=0.5, **style)
            means = [mean(column) for column in zip(*rows, strict=True)]
            axes.plot(counts, means, linewidth=2, marker="o", label=f"{name}, {label}", **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(xlabel="views given to the decoder", ylabel="masked loss, minus that of one view")
    axes.legend(frameon=False, fontsize=7)


def _draw_scores(axes: Any, weights: dict[str, Contents]) -> None:
    """End-point errors, or the first score of sets without them: a bar for the mean of the seeds, a dot for each."""
    there = {name for seeds in weights.values() for content in seeds for name in content["scores"]}
    score = next((name for name in (*LEADING, *SCORES) if name in there), "epe")
    for i, seeds in enumerate(weights.values()):
        if values := [value for content in seeds if (value := content["scores"].get(score)) is not None]:
            axes.bar(i, mean(values), color=f"C{i}", alpha=0.5, width=0.6)
            axes.plot([i] * len(values), values, "o", color=f"C{i}", markersize=4)
    axes.set_xticks(range(len(weights)), list(weights))
    axes.set_ylabel(LEADING.get(score, score_title(score)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastmum.evaluate.seeds", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="results of fastmum.evaluate (its --out)")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also draw into this folder")
    args = parser.parse_args(argv)

    def run() -> None:
        records = read(args.folder)
        spread = by_seed(records)
        if not spread:
            raise DataError(f"'{args.folder}' holds no results of fastmum.evaluate")
        print(tables(spread))
        print(overview(record.content for record in records)[0].markdown())
        for file in draw(spread, args.plots) if args.plots else ():
            print(file)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

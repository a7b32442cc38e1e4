"""Learning curves of evaluations: `python -m fastmum.evaluate.curves DIR [DIR ...] --plots DIR`.

Each DIR is a folder of results of `fastmum.evaluate`, one for each moment of training: the results of checkpoints
with as many steps. Weights whose names differ only in a final number are seeds of one model, as in
`fastmum.evaluate.seeds`.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from fastmum.data.errors import DataError
from fastmum.errors import run_command
from fastmum.evaluate.records import MATCHERS, file_stem, make_folder, read
from fastmum.evaluate.results import TITLES, Contents, check_same, markdown, mean_sd, models, set_of
from fastmum.evaluate.seeds import svg_axes

Points = dict[int, list[float]]  # by frames seen, a value for each seed


def curves(folders: Sequence[Path]) -> dict[tuple[str, str], dict[str, Points]]:
    """End-point errors by (task, set), then by the name of the weights without the seed."""
    measured: dict[tuple[str, str], Contents] = defaultdict(list)
    found: dict[tuple[str, str], dict[str, Points]] = defaultdict(dict)
    for content in (record.content for folder in folders for record in read(folder)):
        if content.get("frames") is not None and content["scores"].get("epe") is not None:
            measured[content["task"], set_of(content)].append(content)
    if not measured:
        raise DataError("no folder has an end-point error of a checkpoint whose number of frames is known")
    for key, contents in measured.items():
        check_same(contents)
        named = models([content | {"frames": None} for content in contents], alone=True)  # these differ along a curve
        for content in contents:
            points = found[key].setdefault(named[content["weights"]], {})
            points.setdefault(content["frames"], []).append(content["scores"]["epe"])
    return dict(found)


def table(models: dict[str, Points]) -> str:
    """Mean and standard deviation of end-point errors by model and frames; "(n)" where a moment has fewer seeds."""
    frames = sorted({count for points in models.values() for count in points})
    rows = [["weights", *(f"{count:,}" for count in frames)]]
    for name, points in models.items():
        seeds = max(map(len, points.values()))
        rows.append([name, *(mean_sd(points.get(count, []), ".1f", among=seeds) for count in frames)])
    return markdown(rows)


def draw(models: dict[str, Points], title: str, file: Path) -> None:
    """The curves as an SVG: a line for the mean of the seeds, a dot for each."""
    labels = {"xlabel": "frames seen", "ylabel": "end-point error, pixels of 448 x 448"}
    with svg_axes(file, title=title, **labels) as axes:
        for i, (name, points) in enumerate(models.items()):
            frames = sorted(points)
            axes.plot(frames, [mean(points[count]) for count in frames], color=f"C{i}", label=name)
            for count in frames:
                axes.plot([count] * len(points[count]), points[count], "o", color=f"C{i}", markersize=3)
        axes.set_xscale("log")
        axes.legend(frameon=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastmum.evaluate.curves", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="results (its --out), one for each moment")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also draw into this folder")
    args = parser.parse_args(argv)

    def run() -> None:
        for (task, name), found in curves(args.folders).items():
            title = f"{MATCHERS[task]}, {TITLES.get(name, name)}"
            print(f"**{title}: EPE by frames seen**\n\n{table(found)}\n")
            if args.plots:
                make_folder(args.plots, "--plots")
                draw(found, title, args.plots / f"{file_stem('curve', task, name)}.svg")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

"""The page of a folder of results: the table, charts, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmum.evaluate.features import NORMS
from fastmum.evaluate.folder import Record
from fastmum.evaluate.table import MATCHERS, NOTE, OTHER_VIEWS, SCORES, TITLES, table
from fastmum.report.charts import Chart, Line, color
from fastmum.report.page import embed, number, render

PICTURE_SIDE = 2048  # pixels: rows of squares are wide
WARPS = "warp, the same by the true warp (white: not visible in B), B"
CAPTIONS = {
    "matching": f"A, B moved onto A by the best probe's {WARPS}",
    "cosine": f"A, B moved onto A by the cosine {WARPS}",
    "attention": "attention of the framed patch of A to the patches of B in the decoder's global blocks, mean over "
    "heads; the cross is its true place",
    "views": "a frame, its visible patches, and predictions from it alone, with the nearest other views, and with as "
    "many views of another scene",
}


def page(records: Sequence[Record]) -> str:
    """The HTML of results; it needs no other file."""
    return render(
        "evaluate/results.html",
        title="Correspondence across views",
        results=table(records),
        note=NOTE,
        records=[record.content for record in records],
        charts=[_charts(record.content) for record in records],
        tables=[_table(record.content) for record in records],
        pictures=[[url for file in record.pictures if (url := embed(file, PICTURE_SIDE))] for record in records],
        captions=CAPTIONS,
        matchers=MATCHERS,
        titles=TITLES,
    )


def _charts(content: dict[str, Any]) -> list[Chart]:
    charts = []
    if content["task"] == "matching":
        charts = [
            _curves(content["probes"], "epe", "End-point error on the test pairs", "pixels of 448 x 448"),
            _curves(content["probes"], "train_loss", "Training loss", "negative log-likelihood"),
        ]
    elif content["task"] == "views":
        lines = [
            Line(label, list(zip(content["views"], content[name], strict=True)), color(i), dots=True)
            for i, (name, label) in enumerate(OTHER_VIEWS.items())
        ]
        note = "same frames, same masks"
        charts = [Chart("Masked loss by number of views", lines, "masked loss", note, x_label="views")]
    return [chart for chart in charts if any(line.points for line in chart.lines)]


def _table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows: changes of the loss by number of views, or the scores of each block or norm."""
    if content["task"] == "matching":
        return [], []
    if content["task"] == "views":
        names = ["loss, minus that of one view", *(f"{count} views" for count in content["views"][1:])]
        changes = {label: content[f"change_{name}"][1:] for name, label in OTHER_VIEWS.items()}
        return names, [[each, *(f"{m:+.4f} ± {number(error)}" for m, error in row)] for each, row in changes.items()]
    blocks = content.get("blocks") or {norm: content[norm]["scores"] for norm in NORMS}
    columns = [score for score in SCORES if score in next(iter(blocks.values()))]
    names = ["global block" if "blocks" in content else "features", *(SCORES[column] for column in columns)]
    return names, [[name, *(number(found[column]) for column in columns)] for name, found in blocks.items()]


def _curves(probes: list[dict[str, Any]], name: str, title: str, y_label: str) -> Chart:
    """A line for each learning rate: the minimum over its weight decays at every evaluation."""
    best: dict[float, dict[int, float]] = {}
    for probe in probes:
        points = best.setdefault(probe["learning_rate"], {})
        for each in probe["evaluations"]:
            if each[name] is not None:
                points[each["step"]] = min(each[name], points.get(each["step"], each[name]))
    lines = [
        Line(f"learning rate {rate:g}", list(points.items()), color(i), dots=True)
        for i, (rate, points) in enumerate(best.items())
    ]
    return Chart(title, lines, y_label, "minimum over weight decays")

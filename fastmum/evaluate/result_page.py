"""The page of evaluation results: tables, charts and pictures in one file."""

from collections.abc import Sequence
from typing import Any

from fastmum.evaluate.features import NORMS
from fastmum.evaluate.records import MATCHERS, Record
from fastmum.evaluate.results import (
    COUNTED,
    NONE,
    NOTE,
    OTHER_VIEWS,
    PARTS,
    SCORES,
    TITLES,
    ResultGroup,
    ResultTable,
    group,
    group_table,
)
from fastmum.report.charts import Chart, Line, color
from fastmum.report.page import embed, number, render

PICTURE_SIDE = 2048  # pixels: rows of squares are wide
WARPS = "warp, the same by the true warp (white: not visible in B), B"
CAPTIONS = {
    "matching": f"A, B moved onto A by the best probe's {WARPS}",
    "discriminant": f"A, B moved onto A by the closed-form probe's {WARPS}",
    "cosine": f"A, B moved onto A by the cosine {WARPS}",
    "attention": "attention of the framed patch of A to the patches of B in the decoder's global blocks, mean over "
    "heads; the cross is its true place",
    "recognition": "test images under the class of the attentive probe; where it is wrong, with the true class",
    "segmentation": "an image, its labels, and the predicted ones; black: not scored",
    "reconstruction": "frames with true and predicted depth and its error; cameras and points from above, aligned",
    "pose": "points of view 1, and their epipolar lines in view 2: predicted in their colours, true in white",
    "roma": "A, B, each warped onto the other where the warp is certain, the certainty, B by the true warp",
    "depth": "image, true depth, the best head's depth and its relative error (up to 0.5); white: unknown",
    "views": "a frame, its visible patches, and predictions from it alone, with the nearest other views, and with as "
    "many views of another scene",
}


def page(records: Sequence[Record], overview: ResultTable | None = None, notes: Sequence[str] = ()) -> str:
    """The HTML of results, below an overview of them and notes on it if given; it needs no other file."""
    contents = [record.content for record in records]
    return render(
        "evaluate/results.html", title="Correspondence across views", records=contents,
        groups=[(_title(each), group_table(each)) for each in group(contents)],
        charts=[_charts(content) for content in contents], tables=[_table(content) for content in contents],
        pictures=[[url for file in record.pictures if (url := embed(file, PICTURE_SIDE))] for record in records],
        note=NOTE, overview=overview, notes=notes, captions=CAPTIONS, matchers=MATCHERS, titles=TITLES,
    )  # fmt: skip


def _title(group: ResultGroup) -> str:
    """The evaluation, the set, the number of pairs, and the size."""
    label, count, size = group.about()
    pairs = [] if count == NONE else [count if group.task in COUNTED else f"{count} pairs"]
    sizes = [] if size == NONE else [f"{size} × {size} px"]
    named = [] if group.protocol == NONE else [f"protocol {group.protocol}"]
    return ", ".join([f"{MATCHERS[group.task].capitalize()}: {label}", *pairs, *sizes, *named])


def _charts(content: dict[str, Any]) -> list[Chart]:
    charts = []
    if content["task"] == "matching":
        probes, on = content.get("probes", []), content["settings"].get("chosen_on", "test pairs")
        error = _curves(probes, "epe", f"End-point error on the {on}", "pixels of 448 x 448")
        charts = [error, _curves(probes, "train_loss", "Training loss", "negative log-likelihood")]
    elif content["task"] == "views":
        lines = [
            Line(label, list(zip(content["views"], content[name], strict=True)), color(i), dots=True)
            for i, (name, label) in enumerate(OTHER_VIEWS.items())
            if name in content
        ]
        note = "same frames, same masks"
        charts = [Chart("Masked loss by number of views", lines, "masked loss", note, x_label="views")]
    return [chart for chart in charts if any(line.points for line in chart.lines)]


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


def _table(content: dict[str, Any]) -> ResultTable:
    """Changes of the loss by number of views, or the scores of each block, head or norm."""
    if content["task"] == "views":
        names = ["loss, minus that of one view", *(f"{count} views" for count in content.get("views", [])[1:])]
        rows = [
            (label, content[f"change_{name}"][1:]) for name, label in OTHER_VIEWS.items() if f"change_{name}" in content
        ]
        return ResultTable(names, [[each, *(f"{m:+.4f} ± {number(error)}" for m, error in row)] for each, row in rows])
    part = next((key for key in PARTS if key in content), "")
    blocks = content[part] if part else {norm: content[norm]["scores"] for norm in NORMS if norm in content}
    columns = [score for score in SCORES if any(score in found for found in blocks.values())]
    names = [PARTS.get(part, "features"), *(SCORES[column] for column in columns)]
    return ResultTable(names, [[name, *(number(found.get(s)) for s in columns)] for name, found in blocks.items()])

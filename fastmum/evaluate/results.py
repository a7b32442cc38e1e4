"""Results of evaluations: a folder of JSON files and pictures, a table next to the paper's numbers, and a page."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastmum.data.errors import DataError
from fastmum.errors import writing
from fastmum.evaluate.features import NORMS
from fastmum.files import write_atomic
from fastmum.report.charts import Chart, Line, color
from fastmum.report.page import embed, number, render

KEYS = ("task", "set", "weights")

# The paper's EPE of linear probes (Table 4), and EPE and recall (NAVI) of cosine matching (supplement, Table 13).
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "matching": {
        "MuM": {"megadepth": 10.2, "scannet": 27.9},
        "DINOv3": {"megadepth": 19.0, "scannet": 28.7},
        "CroCo v2": {"megadepth": 27.3},
        "MAE": {"megadepth": 29.7, "scannet": 35.0},
    },
    "cosine": {
        "MuM": {"navi": 46.9, "megadepth": 50.8, "scannet": 55.7},
        "DINOv3": {"navi": 62.8, "megadepth": 36.5, "scannet": 56.4},
        "CroCo v2": {"navi": 41.0, "megadepth": 60.3, "scannet": 62.1},
        "MAE": {"navi": 43.7, "megadepth": 88.8, "scannet": 83.4},
    },
}
MATCHERS = {
    "matching": "linear probe", "discriminant": "closed-form probe", "cosine": "cosine", "attention": "attention",
    "views": "masked loss",
}  # fmt: skip
TITLES = {"megadepth": "MegaDepth", "scannet": "ScanNet", "navi": "NAVI"}
SCORES = {
    "epe": "EPE ↓", "robustness": "R ↑", "pck1": "PCK@1 ↑", "pck3": "PCK@3 ↑", "pck5": "PCK@5 ↑",
    "recall": "Recall ↑", "recall_1cm": "1 cm ↑", "recall_2cm": "2 cm ↑", "recall_5cm": "5 cm ↑",
}  # fmt: skip
OTHER_VIEWS = {"same": "with views of the same scene", "other": "with views of another scene"}  # results of "views"
VIEWS = "views_"  # prefix of scores that are losses; the number of views follows
NONE = "–"
NOTE = (
    "EPE: end-point error in pixels of 448 x 448. R: matches within 32 px, PCK@k: within k px, recall: within 1, 2 and "
    "5 cm, in percent. The paper's numbers are EPE, and recall on NAVI (Table 4: linear probe; Table 13: cosine). "
    "Masked loss: of the same frames, without and with the nearest other views; 1.0 is the loss of predicting each "
    "patch's mean."
)

PICTURE_SIDE = 2048  # pixels: rows of squares are wide
WARPS = "warp, the same by the true warp (white: not visible in B), B"
CAPTIONS = {
    "matching": f"A, B moved onto A by the best probe's {WARPS}",
    "discriminant": f"A, B moved onto A by the closed-form probe's {WARPS}",
    "cosine": f"A, B moved onto A by the cosine {WARPS}",
    "attention": "attention of the framed patch of A to the patches of B in the decoder's global blocks, mean over "
    "heads; the cross is its true place",
    "views": "a frame, its visible patches, and predictions from it alone, with the nearest other views, and with as "
    "many views of another scene",
}


class Record(NamedTuple):
    """A result in the folder."""

    file: Path  # JSON
    content: dict[str, Any]  # "task", "set", "weights", "scores", ...
    pictures: list[Path]


def make_folder(folder: Path) -> None:
    """Create a folder and check that it is writable; raises `DataError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise DataError(f"--out '{folder}' cannot be written to ({error.strerror}); name another folder") from None


def check_free(folder: Path, content: dict[str, Any]) -> None:
    """Check that a result would not replace one of another set or of other weights; else raise a `DataError`.

    Sets or weights whose names differ only in punctuation share a file, as do weights files of one name. "source", the
    path of the weights, is compared if both results have it.
    """
    file = folder / f"{_stem(content)}.json"
    old = _content(file) if file.exists() else content
    if (old["set"], old["weights"]) != (content["set"], content["weights"]):
        new, other = (f"'{each['weights']}' on '{each['set']}'" for each in (content, old))
    elif len({Path(each["source"]).expanduser().resolve() for each in (content, old) if "source" in each}) == 2:
        new, other = (f"'{each['source']}'" for each in (content, old))
    else:
        return
    raise DataError(f"results of {new} would replace those of {other} in '{file}'; pass another --name or --out")


def save(folder: Path, content: dict[str, Any], pictures: Sequence[Image.Image]) -> Record:
    """Write a result; an earlier one of the same evaluation, set and weights is replaced. Raises `DataError`."""
    check_free(folder, content)
    stem = _stem(content)
    try:
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise DataError(f"the results of '{content['weights']}' on '{content['set']}' are no JSON ({error})") from None
    files = [folder / f"{stem}-{i}.jpg" for i in range(len(pictures))]
    with writing(folder, DataError):
        for old in _pictures(folder, stem):
            old.unlink()
        for picture, path in zip(pictures, files, strict=True):
            picture.save(path, quality=90, subsampling=0)
        write_atomic(folder / f"{stem}.json", text)
    return Record(folder / f"{stem}.json", content, files)


def read(folder: Path) -> list[Record]:
    """All results in the folder, sorted by task, set and weights; raises `DataError` for any other JSON file."""
    records = [Record(file, _content(file), _pictures(folder, file.stem)) for file in folder.glob("*.json")]
    return sorted(records, key=lambda r: ([*MATCHERS].index(r.content["task"]), r.content["set"], r.content["weights"]))


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        valid = all(isinstance(content[key], str) for key in KEYS) and content["task"] in MATCHERS
        if not valid or not all(isinstance(content[key], dict) for key in ("scores", "settings")):
            raise ValueError("it is of another kind")
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise DataError(f"'{file}' is no result of fastmum.evaluate ({reason}); move it elsewhere") from None
    return content


def _pictures(folder: Path, stem: str) -> list[Path]:
    numbered = ((re.fullmatch(re.escape(stem) + r"-(\d+)\.jpg", file.name), file) for file in folder.glob("*.jpg"))
    return [file for _, file in sorted((int(found[1]), file) for found, file in numbered if found)]


def _stem(content: dict[str, Any]) -> str:
    """Common part of the names of a result's files."""
    return "-".join(re.sub(r"[^\w.]+", "_", content[key]).strip("_") or "_" for key in KEYS)


class ResultTable(NamedTuple):
    """Column names and rows of text."""

    names: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table as aligned Markdown with a note on its numbers."""
        widths = [max(map(len, column)) for column in zip(self.names, *self.rows, strict=True)]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in (self.names, *self.rows)
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([*lines, "", NOTE]) + "\n"


def table(records: Sequence[Record]) -> ResultTable:
    """A row for each matcher, set and weights, with the paper's numbers for the same matcher and set.

    The first rows are the scores of the identity warp on each set. The paper's sets have a row even without results.
    """
    contents = [record.content for record in records]
    there = {name for content in contents for name in content["scores"]}
    losses = sorted((name for name in there if name.startswith(VIEWS)), key=lambda name: int(name.removeprefix(VIEWS)))
    columns = [*(name for name in SCORES if name == "epe" or name in there), *losses]
    methods = list(dict.fromkeys(method for values in PUBLISHED.values() for method in values))

    def row(matcher: str, set_: str, weights: str, scores: dict, paper: list[str]) -> list[str]:
        cells = [_number(scores.get(score), 3 if score.startswith(VIEWS) else 1) for score in columns]
        return [matcher, TITLES.get(set_, set_), weights, *cells, *paper]

    still = {content["set"]: content["no_motion"] for content in reversed(contents) if "no_motion" in content}
    rows = [row("no motion", name, NONE, scores, [NONE] * len(methods)) for name, scores in still.items()]
    for task, matcher in MATCHERS.items():
        own = [content for content in contents if content["task"] == task]
        published = PUBLISHED.get(task, {}) if own else {}
        sets = [*(content["set"] for content in own), *(name for values in published.values() for name in values)]
        for name in dict.fromkeys(sets):
            paper = [_number(published.get(method, {}).get(name)) for method in methods]
            ours = [content for content in own if content["set"] == name] or [{"weights": NONE, "scores": {}}]
            rows += [row(matcher, name, content["weights"], content["scores"], paper) for content in ours]
    names = ["matcher", "set", "weights", *map(score_title, columns), *(f"paper: {method}" for method in methods)]
    return ResultTable(names, rows)


def score_title(name: str) -> str:
    """Title of a score's column; the arrow points to the better direction."""
    if name.startswith(VIEWS):
        count = name.removeprefix(VIEWS)
        return f"loss, {count} view{'s' * (count != '1')} ↓"
    return SCORES[name]


def _number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def page(records: Sequence[Record]) -> str:
    """The HTML of results; it needs no other file."""
    contents = [record.content for record in records]
    return render(
        "evaluate/results.html", title="Correspondence across views", results=table(records), records=contents,
        charts=[_charts(content) for content in contents], tables=[_table(content) for content in contents],
        pictures=[[url for file in record.pictures if (url := embed(file, PICTURE_SIDE))] for record in records],
        note=NOTE, captions=CAPTIONS, matchers=MATCHERS, titles=TITLES,
    )  # fmt: skip


def _charts(content: dict[str, Any]) -> list[Chart]:
    charts = []
    if content["task"] == "matching":
        error = _curves(
            content["probes"],
            "epe",
            f"End-point error on the {content['settings'].get('chosen_on', 'test pairs')}",
            "pixels of 448 x 448",
        )
        charts = [error, _curves(content["probes"], "train_loss", "Training loss", "negative log-likelihood")]
    elif content["task"] == "views":
        lines = [
            Line(label, list(zip(content["views"], content[name], strict=True)), color(i), dots=True)
            for i, (name, label) in enumerate(OTHER_VIEWS.items())
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


def _table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows: changes of the loss by number of views, or the scores of each block or norm."""
    if content["task"] in ("matching", "discriminant"):
        return [], []
    if content["task"] == "views":
        names = ["loss, minus that of one view", *(f"{count} views" for count in content["views"][1:])]
        changes = {label: content[f"change_{name}"][1:] for name, label in OTHER_VIEWS.items()}
        return names, [[each, *(f"{m:+.4f} ± {number(error)}" for m, error in row)] for each, row in changes.items()]
    blocks = content.get("blocks") or {norm: content[norm]["scores"] for norm in NORMS}
    columns = [score for score in SCORES if score in next(iter(blocks.values()))]
    names = ["global block" if "blocks" in content else "features", *(SCORES[column] for column in columns)]
    return names, [[name, *(number(found[column]) for column in columns)] for name, found in blocks.items()]

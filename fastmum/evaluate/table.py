"""One table of all results, with the paper's numbers next to ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastmum.evaluate.folder import TASKS, Record

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
    "attention": {},
    "views": {},
}

MATCHERS = {"matching": "linear probe", "cosine": "cosine", "attention": "attention", "views": "masked loss"}
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


class Table(NamedTuple):
    """Column names and rows of cells."""

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


def table(records: Sequence[Record]) -> Table:
    """A row for each matcher, set and weights, with the paper's numbers for the same matcher and set.

    The first rows are the scores of the identity warp on each set. The paper's sets have a row even without results.
    """
    contents = [record.content for record in records]
    there = {name for content in contents for name in content["scores"]}
    losses = sorted((name for name in there if name.startswith(VIEWS)), key=lambda name: int(name.removeprefix(VIEWS)))
    columns = [*(name for name in SCORES if name == "epe" or name in there), *losses]
    methods = list(dict.fromkeys(method for task in TASKS for method in PUBLISHED[task]))

    def row(matcher: str, set_: str, weights: str, scores: dict, paper: list[str]) -> list[str]:
        cells = [_number(scores.get(score), 3 if score.startswith(VIEWS) else 1) for score in columns]
        return [matcher, TITLES.get(set_, set_), weights, *cells, *paper]

    still = {content["set"]: content["no_motion"] for content in reversed(contents) if "no_motion" in content}
    rows = [row("no motion", name, NONE, scores, [NONE] * len(methods)) for name, scores in still.items()]
    for task in TASKS:
        own = [content for content in contents if content["task"] == task]
        published = PUBLISHED[task] if own else {}
        sets = [*(content["set"] for content in own), *(name for values in published.values() for name in values)]
        for name in dict.fromkeys(sets):
            paper = [_number(published.get(method, {}).get(name)) for method in methods]
            ours = [content for content in own if content["set"] == name] or [{"weights": NONE, "scores": {}}]
            rows += [row(MATCHERS[task], name, content["weights"], content["scores"], paper) for content in ours]
    names = ["matcher", "set", "weights", *map(score_title, columns), *(f"paper: {method}" for method in methods)]
    return Table(names, rows)


def score_title(name: str) -> str:
    """Title of a score's column; the arrow points to the better direction."""
    if name.startswith(VIEWS):
        count = name.removeprefix(VIEWS)
        return f"loss, {count} view{'s' * (count != '1')} ↓"
    return SCORES[name]


def _number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:.{digits}f}"

"""One table of all results, with the paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastmum.evaluate.folder import TASKS, Record
from fastmum.evaluate.published import PUBLISHED

MATCHERS = {"matching": "linear probe", "cosine": "cosine", "attention": "attention", "views": "masked loss"}
TITLES = {"megadepth": "MegaDepth", "scannet": "ScanNet", "navi": "NAVI"}
SCORES = {
    "epe": "EPE ↓",
    "robustness": "R ↑",
    "pck1": "PCK@1 ↑",
    "pck3": "PCK@3 ↑",
    "pck5": "PCK@5 ↑",
    "recall": "Recall ↑",
    "recall_1cm": "1 cm ↑",
    "recall_2cm": "2 cm ↑",
    "recall_5cm": "5 cm ↑",
}
COMPANY = {"same": "with views of the same scene", "other": "with views of another scene"}  # results of "views"
VIEWS = "views_"  # scores that are losses begin with it; the number of views follows
NONE = "–"
NOTE = (
    "EPE: end-point error in pixels of 448 x 448. R: matches within 32 px, PCK@k: within k px, recall: within 1, 2 and "
    "5 cm, in percent. The paper's numbers are EPE, and recall on NAVI (Table 4: linear probe; Table 13: cosine). "
    "Masked loss: of the same frames, alone and with the nearest other views; 1.0 knows no more than a patch's mean."
)


class Table(NamedTuple):
    """A table.

    Args:
        names: of the columns.
        rows: of cells, as text.
    """

    names: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table as aligned Markdown, and what its numbers are."""
        widths = [max(map(len, column)) for column in zip(self.names, *self.rows, strict=True)]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in (self.names, *self.rows)
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([*lines, "", NOTE]) + "\n"


def table(records: Sequence[Record]) -> Table:
    """All results: a row for each matcher, set and weights, with the paper's number for the same matcher and set.

    The paper's sets have a row also where nothing was evaluated on them. First, for each set, what a warp scores that
    leaves everything in place.
    """
    scores = _scores(records)
    methods = list(dict.fromkeys(method for task in TASKS for method in PUBLISHED[task]))
    still = {r.content["set"]: r.content["no_motion"] for r in reversed(records) if "no_motion" in r.content}
    rows = [
        [
            "no motion",
            TITLES.get(name, name),
            NONE,
            *(_number(found.get(score)) for score in scores),
            *[NONE] * len(methods),
        ]
        for name, found in still.items()
    ]
    for task in TASKS:
        own = [record.content for record in records if record.content["task"] == task]
        sets = dict.fromkeys(content["set"] for content in own)
        published = PUBLISHED[task] if own else {}
        for name in dict.fromkeys([*sets, *(name for values in published.values() for name in values)]):
            paper = [_number(published.get(method, {}).get(name)) for method in methods]
            ours = [content for content in own if content["set"] == name] or [{"weights": NONE, "scores": {}}]
            for content in ours:
                cells = [_number(content["scores"].get(score), 3 if score.startswith(VIEWS) else 1) for score in scores]
                rows.append([MATCHERS[task], TITLES.get(name, name), content["weights"], *cells, *paper])
    names = ["matcher", "set", "weights", *map(score_title, scores), *(f"paper: {m}" for m in methods)]
    return Table(names, rows)


def score_title(name: str) -> str:
    """Of a score's column; an arrow points to the better."""
    if name.startswith(VIEWS):
        count = name.removeprefix(VIEWS)
        return f"loss, {count} view{'s' * (count != '1')} ↓"
    return SCORES[name]


def _scores(records: Sequence[Record]) -> list[str]:
    """End-point error, and what else any result has."""
    there = {name for record in records for name in record.content["scores"]}
    losses = [name for name in there if name.startswith(VIEWS)]
    return [
        *(name for name in SCORES if name == "epe" or name in there),
        *sorted(losses, key=lambda name: int(name.removeprefix(VIEWS))),
    ]


def _number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:.{digits}f}"

"""The page of a folder of results: the table, curves of the probes, blocks of the decoder, pictures."""

from __future__ import annotations

import html
from collections.abc import Sequence

from fastmum.evaluate.folder import Record
from fastmum.evaluate.table import COMPANY, MATCHERS, NONE, NOTE, SCORES, TITLES, table
from fastmum.report.chart import Chart, Line
from fastmum.report.curves import color
from fastmum.report.document import document, embed
from fastmum.report.document import table as html_table
from fastmum.report.scale import write

PICTURE_SIDE = 2048  # pixels: rows of squares are wide
CAPTIONS = {
    "matching": "A, B moved onto A by the best probe's warp, the same by the true warp (white: not seen in B), B",
    "cosine": "A, B moved onto A by cosine matching, the same by the true warp (white: not seen in B), B",
    "attention": (
        "attention of the framed patch of A to the patches of B in the decoder's global blocks, mean over heads; "
        "the cross is its true place"
    ),
    "views": (
        "a frame, what of it is seen, and what is predicted from it alone, with the nearest other views, and with as "
        "many views of another scene"
    ),
}


def page(records: Sequence[Record]) -> str:
    """The HTML of results; no other file is needed to show it."""
    results = table(records)
    sets = ", ".join(dict.fromkeys(_title(record.content["set"]) for record in records))
    rows = [[html.escape(cell) for cell in row] for row in results.rows]
    body = [
        f"<header><h1>What is known across views</h1><p>{len(records)} evaluations on {html.escape(sets)}</p></header>",
        f'<section>{html_table(results.names, rows)}<p class="note">{html.escape(NOTE)}</p></section>',
        *(_section(record) for record in records),
    ]
    return document("What is known across views", body)


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _section(record: Record) -> str:
    """Everything about one result."""
    content = record.content
    title = f"{MATCHERS[content['task']]}, {_title(content['set'])}: {content['weights']}"
    parts = [f"<h3>{html.escape(title)}</h3>", f'<p class="note">{html.escape(_settings(record))}</p>']
    if content["task"] == "matching":
        parts.append(f'<div class="grid">{_error_chart(content)}{_loss_chart(content)}</div>')
    elif content["task"] == "views":
        parts.append(f'<div class="grid">{_views_chart(content)}</div>{_changes(content)}')
    elif content["task"] == "attention":
        parts.append(_variants("global block", content["blocks"]))
    else:
        parts.append(_variants("features", {norm: content[norm]["scores"] for norm in ("layernorm", "raw")}))
    pictures = [source for file in record.pictures if (source := embed(file, PICTURE_SIDE))]
    if pictures:
        parts.append(f'<p class="note">{CAPTIONS[content["task"]]}</p>')
        parts += [f'<div class="stage"><img src="{source}" alt="{html.escape(title)}"></div>' for source in pictures]
    return f"<section>{''.join(parts)}</section>"


def _settings(record: Record) -> str:
    content = record.content
    listed = [f"{name.replace('_', ' ')} {value}" for name, value in content["settings"].items()]
    best = content.get("best")
    if best is None:
        pass
    elif isinstance(best, dict):
        rate, decay = best["learning_rate"], best["weight_decay"]
        listed.insert(0, f"best: learning rate {rate:g}, weight decay {decay:g}, after {best['step']:,} steps")
    else:
        listed.insert(0, f"best: {best}")
    return "; ".join(listed)


def _variants(name: str, variants: dict[str, dict[str, float | None]]) -> str:
    """A table of the same evaluation in several ways."""
    columns = [score for score in SCORES if score in next(iter(variants.values()))]
    rows = [
        [html.escape(variant), *(NONE if scores[c] is None else write(scores[c]) for c in columns)]
        for variant, scores in variants.items()
    ]
    return html_table([name, *(SCORES[column] for column in columns)], rows)


def _views_chart(content: dict) -> str:
    lines = [
        Line(label, list(zip(content["views"], content[name], strict=True)), color(i), dots=True)
        for i, (name, label) in enumerate(COMPANY.items())
    ]
    return Chart("Masked loss by number of views", lines, "of the same frames under the same masks", "views").html()


def _changes(content: dict) -> str:
    """A table of the differences to a frame alone, with their standard errors."""
    rows = [
        [
            label,
            *(
                f"{mean:+.4f} ± {NONE if error is None else write(error)}"
                for mean, error in content[f"change_{name}"][1:]
            ),
        ]
        for name, label in COMPANY.items()
    ]
    return html_table(["loss, less that of a frame alone", *(f"{n} views" for n in content["views"][1:])], rows)


def _error_chart(content: dict) -> str:
    return _chart(content, "End-point error on the test pairs", "pixels of 448 x 448, least over weight decays", "epe")


def _loss_chart(content: dict) -> str:
    return _chart(content, "Training loss", "negative log-likelihood, least over weight decays", "train_loss")


def _chart(content: dict, title: str, note: str, name: str) -> str:
    """A line for each learning rate: at every evaluation the least over its weight decays."""
    lines = []
    rates = dict.fromkeys(probe["learning_rate"] for probe in content["probes"])
    for i, rate in enumerate(rates):
        points: dict[int, float] = {}
        for probe in content["probes"]:
            for each in probe["evaluations"] if probe["learning_rate"] == rate else ():
                if each[name] is not None:
                    points[each["step"]] = min(each[name], points.get(each["step"], each[name]))
        lines.append(Line(f"learning rate {rate:g}", list(points.items()), color(i), dots=True))
    shown = [line for line in lines if line.points]
    return Chart(title, shown, note).html() if shown else ""

"""The page: summary, curves, reconstructions, cost, configuration, checkpoints and faults, in one file."""

from __future__ import annotations

import html
import statistics

from fastmum.engine.paper import PAPER_RUNS, SOURCE
from fastmum.report.curves import charts, color
from fastmum.report.document import date, document, table
from fastmum.report.pictures import reconstructions
from fastmum.report.run import Run
from fastmum.report.scale import write

RECENT_LINES = 10  # of metrics.jsonl, that the speed in the summary is the median of
LISTED = 200  # bad frames


def page(runs: list[Run]) -> str:
    """The HTML of one run, or of several side by side."""
    title = " · ".join(run.label for run in runs)
    single = len(runs) == 1
    body = [
        f"<header><h1>{html.escape(title)}</h1><p>{_subtitle(runs)}</p></header>",
        _tiles(runs[0]) if single else _table_of_runs(runs),
        _cost(runs),
        f'<div class="grid">{"".join(chart.html() for chart in charts(runs))}</div>',
        "".join(reconstructions(run) for run in runs),
        *(_details(run, of_run="" if single else f" of {run.label}") for run in runs),
    ]
    return document(title, body)


def _subtitle(runs: list[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs of fastmum"
    run = runs[0]
    where = html.escape(str(run.root))
    return f'<span class="state">{_state(run)}</span> last line of metrics {date(run.written)} · {where}'


def _state(run: Run) -> str:
    return "finished" if run.finished else "not finished"


def _speed(run: Run) -> float | None:
    recent = run.series("frames_per_s")[-RECENT_LINES:]
    return statistics.median(value for _, value in recent) if recent else None


def _number(value: float | None, percent: bool = False) -> str:
    return "–" if value is None else write(value, percent)


def _tiles(run: Run) -> str:
    done = min(1.0, run.step / run.steps) if run.steps else 1.0
    of_steps = f"of {run.steps:,} steps" if run.steps else "steps"
    use = run.last("mfu")
    tiles = [
        _tile("Progress", f"{run.step:,}", of_steps, f'<div class="bar"><i style="width:{100 * done:.1f}%"></i></div>'),
        _tile("Loss", _number(run.last("loss")), "training, newest"),
        _tile("Held-out loss", _number(run.last("held_out_loss")), _best(run)),
        _tile("Throughput", _number(_speed(run)), "frames a second" + (f", {write(use, True)} MFU" if use else "")),
        _tile(
            "Device-hours",
            _number(run.last("gpu_hours")),
            f"so far, {_number(run.last('gpu_hours_projected'))} projected",
        ),
        _tile(
            "Faults",
            _number(run.last("skipped_steps") or 0),
            f"skipped steps, {_number(run.last('bad_frames') or 0)} bad frames",
        ),
    ]
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _best(run: Run) -> str:
    points = run.series("held_out_loss")
    if not points:
        return "not evaluated yet"
    step, value = min(points, key=lambda point: point[1])
    return f"newest; best {write(value)} at step {step:,}"


def _tile(name: str, value: str, below: str, extra: str = "") -> str:
    return f"<div><h2>{name}</h2><b>{value}</b><p>{below}</p>{extra}</div>"


def _table_of_runs(runs: list[Run]) -> str:
    rows = [
        [
            f'<i class="key" style="background:{color(i)}"></i>{html.escape(run.label)}',
            _state(run),
            f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else ""),
            *(_number(value) for value in (run.last("loss"), run.last("held_out_loss"), _speed(run))),
            _number(run.last("mfu"), percent=True),
            *(_number(run.last(name)) for name in ("gpu_hours", "gpu_hours_projected")),
        ]
        for i, run in enumerate(runs)
    ]
    names = ["run", "state", "step", "loss", "held out", "frames/s", "MFU", "device-hours", "projected"]
    return f"<section>{table(names, rows)}</section>"


def _cost(runs: list[Run]) -> str:
    """Device-hours so far and projected, and those of the paper's runs, as bars of one scale."""
    rows = []
    for i, run in enumerate(runs):
        so_far = run.last("gpu_hours")
        if so_far is not None:
            whole = run.last("gpu_hours_projected") or so_far
            text = f"{write(so_far)} so far, {write(whole)} projected"
            rows.append((run.label, so_far, whole, text, color(i)))
    if not rows:
        return ""
    for paper in PAPER_RUNS:
        hours = f"{write(paper.gpu_hours)} ({paper.gpus} × {paper.gpu} × {paper.days:g} days)"
        rows.append((f"paper: {paper.name}", paper.gpu_hours, paper.gpu_hours, hours, "var(--quiet)"))
    longest = max(whole for _, _, whole, _, _ in rows)
    bars = "".join(
        f'<dt>{html.escape(label)}</dt><dd><span class="track" style="color:{bar}">'
        f'<i class="whole" style="width:{100 * whole / longest:.2f}%"></i>'
        f'<i style="width:{100 * so_far / longest:.2f}%"></i></span><span>{text}</span></dd>'
        for label, so_far, whole, text, bar in rows
    )
    return (
        '<section class="cost"><h3>Device-hours for all steps</h3>'
        f'<p class="note">at the present pace; the paper\'s: {SOURCE}. A process on a CPU counts as a device.</p>'
        f"<dl>{bars}</dl></section>"
    )


def _details(run: Run, of_run: str) -> str:
    parts = [
        (f"Checkpoints ({len(run.checkpoints)})", _checkpoints(run)),
        (f"Faults ({_number(run.last('skipped_steps') or 0)} skipped steps)", _faults(run)),
        (f"Bad frames ({_number(run.last('bad_frames') or 0)})", _bad_frames(run)),
        ("Configuration", f"<pre>{html.escape(run.config)}</pre>" if run.config else "<p>There is no config.yaml.</p>"),
    ]
    return "".join(
        f"<details><summary>{html.escape(name + of_run)}</summary>{content}</details>" for name, content in parts
    )


def _checkpoints(run: Run) -> str:
    if not run.checkpoints:
        return "<p>None is kept.</p>"
    rows = [
        [f"{kept.step:,}", html.escape(kept.name), f"{kept.size / 1e6:,.1f} MB", date(kept.written)]
        for kept in reversed(run.checkpoints)
    ]
    return table(["step", "name", "size", "written"], rows)


def _faults(run: Run) -> str:
    """Where the count of skipped steps grew."""
    rows, before, from_step = [], 0.0, 0.0
    for step, count in run.series("skipped_steps"):
        if count > before:
            rows.append([f"{from_step + 1:,.0f} to {step:,}", f"{count - before:,.0f}"])
        before, from_step = count, step
    if not rows:
        return "<p>No step was skipped: every loss and gradient was finite.</p>"
    return table(["steps", "skipped, as loss or gradient was not finite"], rows)


def _bad_frames(run: Run) -> str:
    prefix = "bad_frames/"
    counts = [[html.escape(name.removeprefix(prefix)), _number(run.last(name))] for name in run.names(prefix)]
    if not counts and not run.bad_frames:
        return "<p>Every frame could be read.</p>"
    listed = "\n".join(run.bad_frames[:LISTED])
    more = len(run.bad_frames) - LISTED
    end = f"\n… and {more:,} more in bad_frames.log" if more > 0 else ""
    counted = table(["data set", "bad frames"], counts) if counts else ""
    return f"{counted}<pre>{html.escape(listed + end)}</pre>"

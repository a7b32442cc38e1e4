"""HTML pages from Jinja templates: one file each, with style, script, charts and pictures inside."""

import base64
import io
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from fastmum.engine.gpus import PAPER_RUNS, SOURCE
from fastmum.files import regular
from fastmum.report.charts import color, report_charts
from fastmum.report.run import Run

MAX_PICTURES, MAX_BAD_FRAMES = 24, 200  # of a run, shown
NONE = "–"


def report_page(runs: list[Run]) -> str:
    """The HTML of one run, or of several compared."""
    hours = []  # label, hours so far, hours projected, text, colour
    for i, run in enumerate(runs):
        if (so_far := run.last("gpu_hours")) is not None:
            whole = run.last("gpu_hours_projected") or so_far
            hours.append((run.label, so_far, whole, f"{number(so_far)} so far, {number(whole)} projected", color(i)))
    for paper in PAPER_RUNS if hours else ():
        text = f"{number(paper.gpu_hours)} ({paper.gpus} × {paper.gpu} × {paper.days:g} days)"
        hours.append((f"paper: {paper.name}", paper.gpu_hours, paper.gpu_hours, text, "var(--quiet)"))
    return render(
        "report/report.html",
        title=" · ".join(run.label for run in runs), runs=runs, hours=hours, source=SOURCE, color=color,
        charts=report_charts(runs), pictures=[_pictures(run) for run in runs],
        summaries=[_summary(run) for run in runs],
        details=[row for run in runs for row in _details(run, f" of {run.label}" if len(runs) > 1 else "")],
    )  # fmt: skip


def render(template: str, **values: Any) -> str:
    """Fill a template in this package; values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastmum", "."), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["date"] = date
    page = environment.get_template(template).render(now=datetime.now(UTC), **values)
    return page.encode(errors="replace").decode()  # names of files may hold bytes that are not UTF-8


def number(value: float | None, percent: bool = False) -> str:
    """A number with three digits: 12,345, 0.0812, 1.5M, 43.1 %; a dash for None."""
    if value is None:
        return NONE
    if percent:
        return f"{number(100 * value)} %"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M" if size < 1e9 else f"{value / 1e9:.3g}G"
    if size >= 1000 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(size))}f}" if size >= 1e-3 else f"{value:.3g}"


def date(time: datetime) -> str:
    """A time in UTC as text, to the minute."""
    return f"{time:%Y-%m-%d %H:%M} UTC"


def embed(path: Path, max_side: int = 1280) -> str | None:
    """A picture as a data URL, at most `max_side` pixels wide and high; None if it cannot be read."""
    if (picture := open_picture(path, max_side)) is None:
        return None
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def open_picture(path: Path, max_side: int = 1280) -> Image.Image | None:
    """A picture in RGB, at most `max_side` pixels wide and high; None if it cannot be read."""
    try:
        with Image.open(regular(path)) as file:
            picture = file.convert("RGB")
    except Exception:  # a damaged picture raises any error
        return None
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return picture


def shown_steps(run: Run) -> list[int]:
    """Steps of at most `MAX_PICTURES` reconstructions, evenly spread over the run."""
    steps = list(run.pictures)
    shown = np.linspace(0, len(steps) - 1, min(MAX_PICTURES, len(steps))).round().astype(int)
    return [steps[i] for i in shown]


def _pictures(run: Run) -> list[tuple[int, str]]:
    """(step, data URL) of reconstructions."""
    return [(step, url) for step in shown_steps(run) if (url := embed(run.pictures[step]))]


def _summary(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, note) of the most important numbers."""
    finished = run.steps is not None and run.step >= run.steps
    of_steps = f"of {run.steps:,} steps" if run.steps else "steps"
    share = f" ({run.step / run.steps:.0%})" if run.steps else ""
    held_out, mfu = run.series("held_out_loss"), run.last("mfu")
    step, best = min(held_out, key=lambda point: point[1], default=(0, None))
    speeds = [speed for _, speed in run.series("frames_per_s")[-10:]]
    bad_frames, projected = (run.last(name) for name in ("bad_frames", "gpu_hours_projected"))
    return [
        ("Progress", f"{run.step:,}", f"{of_steps}{share}, {'finished' if finished else 'not finished'}"),
        ("Loss", number(run.last("loss")), "training, newest"),
        ("Held-out loss", number(run.last("held_out_loss")),
         f"newest; best {number(best)} at step {step:,.0f}" if held_out else "not evaluated yet"),
        ("Throughput", number(statistics.median(speeds) if speeds else None),
         "frames/s" + (f", {number(mfu, True)} MFU" if mfu is not None else "")),
        ("Device-hours", number(run.last("gpu_hours")), f"so far, {number(projected)} projected"),
        ("Faults", number(run.last("skipped_steps") or 0), f"skipped steps, {number(bad_frames or 0)} bad frames"),
    ]  # fmt: skip


def _details(run: Run, of_run: str) -> Iterator[tuple[str, list[str], Sequence[tuple[str, ...]], str]]:
    """(title, column names, rows, text) of the folded sections."""
    kept = [(f"{c.step:,}", c.name, f"{c.size / 1e6:,.1f} MB", date(c.written)) for c in reversed(run.checkpoints)]
    names = ["step", "name", "size", "written"]
    yield f"Checkpoints ({len(kept)}){of_run}", names, kept, "" if kept else "None is kept."
    counts = [(0.0, 0.0), *run.series("skipped_steps")]
    grown = [(a, b, n - m) for (a, m), (b, n) in itertools.pairwise(counts) if n > m]
    skipped = [(f"{a + 1:,.0f} to {b:,.0f}", f"{count:,.0f}") for a, b, count in grown]
    text = "" if skipped else "No step was skipped: every loss and gradient was finite."
    yield f"Skipped steps{of_run}", ["steps", "skipped, because loss or gradient was not finite"], skipped, text
    bad = [(name, number(run.last(f"bad_frames/{name}"))) for name in run.names("bad_frames/")]
    text, more = "\n".join(run.bad_frames[:MAX_BAD_FRAMES]), len(run.bad_frames) - MAX_BAD_FRAMES
    text += f"\n… and {more:,} more in bad_frames.log" if more > 0 else ""
    yield f"Bad frames{of_run}", ["data set", "bad frames"], bad, text or ("" if bad else "Every frame was readable.")
    yield f"Configuration{of_run}", [], [], run.config or "There is no config.yaml."

"""Which charts a page has, and from which numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from fastmum.report.chart import Chart, Line
from fastmum.report.run import Point, Run

COLORS = [f"var(--series-{n})" for n in range(1, 7)]  # page.css; told apart by people of every colour vision
SINGLE = "var(--series-2)"  # of single images, beside the ramp of sequences
VIEWS = "loss/views_"
MAX_GROUPS = 7  # of numbers of views
VIEWS_DETAIL = 120  # points of their lines, which are noisy: a mean over more steps each
SETTLING = 0.05  # of a run: the loss falls so far there that all the rest would be flat beside it
RECENT = 10  # the part of a run, one in so many, that the loss against the views is taken from


def charts(runs: list[Run]) -> list[Chart]:
    """The charts of one run, or of several over each other; those without a number are left out."""
    found = [
        _loss(runs),
        *([_views(runs[0])] if len(runs) == 1 else []),
        _profile(runs),
        _curve(runs, "Learning rate", "lr", from_zero=True),
        _curve(runs, "Gradient norm", "grad_norm", "of all gradients; nothing is clipped", log=True),
        _curve(runs, "Throughput", "frames_per_s", "frames a second, all devices", from_zero=True),
        _curve(
            runs, "Throughput by time", "frames_per_s", "frames a second", "gpu_hours", "device-hours", from_zero=True
        ),
        _use(runs),
        _curve(runs, "Waiting for data", "data_wait", "share of the time of training", percent=True, from_zero=True),
        _curve(runs, "Memory", "memory_gb", "GB: CUDA: most allocated; CPU: resident", from_zero=True),
        _curve(runs, "Waiting for checkpoints", "checkpoint_stall_s", "seconds since the last start", from_zero=True),
        _faults(runs),
    ]
    return [chart for chart in found if any(line.points for line in chart.lines)]


def color(index: int) -> str:
    """Of a run, by its place."""
    return COLORS[index % len(COLORS)]


def _curve(
    runs: list[Run],
    title: str,
    name: str,
    note: str = "",
    x: str = "step",
    x_label: str = "step",
    percent: bool = False,
    from_zero: bool = False,
    log: bool = False,
) -> Chart:
    lines = [Line(run.label, run.series(name, x), color(i)) for i, run in enumerate(runs)]
    return Chart(title, lines, note, x_label, percent, from_zero, log)


def _loss(runs: list[Run]) -> Chart:
    lines = []
    for i, run in enumerate(runs):
        several = len(runs) > 1
        held_out = f"{run.label}, held out" if several else "held out"
        lines.append(Line(run.label if several else "training", run.series("loss"), color(i)))
        held_color = color(i) if several else COLORS[1]
        lines.append(Line(held_out, run.series("held_out_loss"), held_color, dots=True, dashed=several))
    note = "on masked patches; 1: each patch's mean alone"
    return Chart("Loss", lines, note, settling=SETTLING)


def _use(runs: list[Run]) -> Chart:
    note = "model TFLOP/s of a device"
    if any(run.series("mfu") for run in runs):
        return _curve(runs, "Model FLOP utilisation", "mfu", f"{note}, of its dense peak", percent=True, from_zero=True)
    return _curve(runs, "Model FLOP/s", "tflops", note, from_zero=True)


def _views(run: Run) -> Chart:
    numbers = [int(name.removeprefix(VIEWS)) for name in run.names(VIEWS)]
    sequences = [S for S in numbers if S > 1]
    lines = (
        [Line("single images", run.series(f"{VIEWS}1"), SINGLE, detail=VIEWS_DETAIL, band=False)]
        if 1 in numbers
        else []
    )
    groups = _grouped(sequences)
    for i, group in enumerate(groups):
        share = round(100 * i / max(1, len(groups) - 1))
        label = f"{group[0]} views" if len(group) == 1 else f"{group[0]} to {group[-1]} views"
        points = _mean(run.series(f"{VIEWS}{S}") for S in group)
        lines.append(
            Line(
                label,
                points,
                f"color-mix(in oklab, var(--ramp-1), var(--ramp-2) {share}%)",
                detail=VIEWS_DETAIL,
                band=False,
            )
        )
    return Chart("Loss by number of views", lines, "training", settling=SETTLING)


def _profile(runs: list[Run]) -> Chart:
    lines = []
    for i, run in enumerate(runs):
        points = []
        for name in run.names(VIEWS):
            recent = [value for step, value in run.series(name) if step >= run.step * (1 - 1 / RECENT)]
            if recent:
                points.append((int(name.removeprefix(VIEWS)), sum(recent) / len(recent)))
        lines.append(Line(run.label, points, color(i), dots=True))
    return Chart("Loss against number of views", lines, "training, mean of the last tenth of the steps", "views")


def _faults(runs: list[Run]) -> Chart:
    lines = []
    for i, run in enumerate(runs):
        of_run = f"{run.label}: " if len(runs) > 1 else ""
        lines.append(Line(f"{of_run}skipped steps", run.series("skipped_steps"), color(i)))
        bad_color = color(i) if of_run else COLORS[1]
        lines.append(Line(f"{of_run}bad frames", run.series("bad_frames"), bad_color, dashed=bool(of_run)))
    return Chart("Skipped steps and bad frames", lines, "so far", from_zero=True, counts=True)


def _grouped(numbers: list[int]) -> list[list[int]]:
    """Numbers in order, in at most `MAX_GROUPS` groups of neighbours, as equal as can be."""
    count = min(MAX_GROUPS, len(numbers))
    bounds = [round(i * len(numbers) / count) for i in range(count + 1)] if count else []
    return [numbers[a:b] for a, b in itertools.pairwise(bounds)]


def _mean(series: Iterable[list[Point]]) -> list[Point]:
    """At every x the mean of those that have a value there."""
    values: dict[float, list[float]] = {}
    for points in series:
        for x, value in points:
            values.setdefault(x, []).append(value)
    return [(x, sum(found) / len(found)) for x, found in sorted(values.items())]

"""Line charts as SVG for HTML pages, and the charts of a report.

Matplotlib draws with placeholder colours, which are replaced by CSS colours: the page chooses light or dark.
"""

import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from fastmum.report.run import VIEWS, Point, Run

INK, GRID = ("#fffd00", "var(--soft)"), ("#fffd01", "var(--line)")  # placeholder, CSS colour
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 10, "text.color": INK[0], "axes.labelcolor": INK[0], "xtick.color": INK[0],
    "ytick.color": INK[0], "axes.edgecolor": INK[0], "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID[0],
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0,
    "axes.formatter.useoffset": False, "axes.formatter.limits": (-3, 6), "lines.markersize": 4,
}  # fmt: skip
MAX_DOTS = 40  # longest line with markers
MAX_GROUPS = 7  # lines in the chart by number of views


@dataclass(frozen=True)
class Line:
    """A line of a chart; points (x, y) are sorted by x."""

    label: str
    points: list[Point]
    color: str  # CSS
    dots: bool = False  # markers, if the points are few
    dashed: bool = False
    detail: int = 500  # longer lines are drawn as this many means of neighbours
    band: bool = True  # shade the range of those neighbours


@dataclass(frozen=True)
class Chart:
    """A line chart; lines without points are not drawn."""

    title: str
    lines: list[Line]
    y_label: str  # quantity and unit
    note: str = ""
    x_label: str = "step"
    percent: bool = False
    from_zero: bool = False
    log: bool = False
    counts: bool = False  # y values are whole numbers
    settling: float = 0.0  # share of the x range, from the left, that does not affect the limits of the y axis

    def svg(self) -> str:
        """The drawing, an `<svg>` element; its text has 10 px where it is 302 px wide."""
        import matplotlib
        from matplotlib.figure import Figure

        placeholders = {line.color: f"#fffe{i:02x}" for i, line in enumerate(self.lines)}
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(4.2, 2.3), layout="constrained")
            self.draw(figure.add_subplot(), placeholders)
            file, metadata = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))  # none
            figure.savefig(file, format="svg", transparent=True, metadata=metadata)
        text = re.sub(r' id="[\w.]+_\d+"', "", file.getvalue())  # ids must be unique in a page
        colors = dict([INK, GRID, *((placeholder, css) for css, placeholder in placeholders.items())])
        return re.sub(r"#fff[de]\w\w\b", lambda found: colors[found[0]], text[text.index("<svg") :])

    def draw(self, axes: Any, colors: Mapping[str, Any]) -> None:
        """Draw into matplotlib's `axes`, without title and legend; `colors` has matplotlib's colour of each line's."""
        from matplotlib import ticker

        values: list[float] = []
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        for line in self.lines:
            points = [point for point in line.points if point[1] > 0 or not self.log]
            if not points:
                continue
            x, mean, low, high = thin(points, line.detail).T
            if line.band and (low < high).any():
                axes.fill_between(x, low, high, color=colors[line.color], alpha=0.16, linewidth=0)
            marker = "o" if (line.dots and len(x) <= MAX_DOTS) or len(x) == 1 else None
            style = "--" if line.dashed else "-"
            axes.plot(x, mean, style, color=colors[line.color], marker=marker, label=line.label)
            settled = x >= x[0] + self.settling * (x[-1] - x[0])
            values += [*mean[settled], *(low[settled] if line.band else ()), *(high[settled] if line.band else ())]
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5, integer=self.counts))
        if self.x_label != "device-hours":
            axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
            axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        if self.percent:
            axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
        if self.log and values:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        if self.settling and values:
            room = 0.05 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1.0
            axes.set_ylim(min(values) - room, max(values) + room)
        if self.from_zero and min(values, default=0.0) >= 0:
            axes.set_ylim(0, max(axes.get_ylim()[1], float(self.counts)))


def thin(points: list[Point], most: int) -> np.ndarray:
    """At most `most` rows (x, mean, minimum, maximum), each of equally many neighbours; the last x stays."""
    size = math.ceil(len(points) / most)
    groups = np.split(np.array(points, np.float64), range(len(points) % size or size, len(points), size))
    return np.array([(g[-1, 0], g[:, 1].mean(), g[:, 1].min(), g[:, 1].max()) for g in groups])


def color(index: int) -> str:
    """CSS colour of a run or series, from page.html."""
    return f"var(--series-{index % 6 + 1})"


def report_charts(runs: list[Run]) -> list[Chart]:
    """The charts of one run, or of several drawn over each other; charts without a number are left out."""

    def curve(title: str, name: str, y_label: str, x: str = "step", x_label: str = "step", **options: Any) -> Chart:
        lines = [Line(run.label, run.series(name, x), color(i)) for i, run in enumerate(runs)]
        return Chart(title, lines, y_label, x_label=x_label, **options)

    loss, faults, several = [], [], len(runs) > 1
    for i, run in enumerate(runs):
        prefix, second, ema = (f"{run.label}, ", color(i), color(i)) if several else ("", color(1), color(2))
        loss.append(Line(f"{prefix}training", run.series("loss"), color(i)))
        loss.append(Line(f"{prefix}held out", run.series("held_out_loss"), second, dots=True, dashed=several))
        loss.append(Line(f"{prefix}held out, EMA", run.series("held_out_loss_ema"), ema, dots=True, dashed=True))
        faults.append(Line(f"{prefix}skipped steps", run.series("skipped_steps"), color(i)))
        faults.append(Line(f"{prefix}bad frames", run.series("bad_frames"), second, dashed=several))
    found = [
        Chart("Loss", loss, "loss", "masked patches; 1 is the loss of predicting each patch's mean", settling=0.05),
        *([] if several else [_by_views(runs[0])]),
        _against_views(runs),
        curve("Learning rate", "lr", "learning rate", from_zero=True),
        curve("Gradient norm", "grad_norm", "L2 norm of all gradients", log=True),
        curve("Throughput", "frames_per_s", "frames/s, all devices", from_zero=True),
        curve("Throughput by time", "frames_per_s", "frames/s", "gpu_hours", "device-hours", from_zero=True),
        curve("Model FLOP utilisation", "mfu", "share of dense peak", percent=True, from_zero=True)
        if any(run.series("mfu") for run in runs)
        else curve("Model FLOP/s", "tflops", "TFLOP/s per device", from_zero=True),
        curve("Waiting for data", "data_wait", "share of training time", percent=True, from_zero=True),
        curve("Memory", "memory_gb", "GB", note="CUDA: peak allocated; CPU: resident", from_zero=True),
        curve("Waiting for checkpoints", "checkpoint_stall_s", "s since the last start", from_zero=True),
        Chart("Skipped steps and bad frames", faults, "count so far", from_zero=True, counts=True),
    ]
    return [chart for chart in found if any(line.points for line in chart.lines)]


def _by_views(run: Run) -> Chart:
    """Training loss by number of views; neighbouring numbers are averaged into at most `MAX_GROUPS` groups."""
    numbers = run.views()
    many = [S for S in numbers if S > 1]
    groups = [group.tolist() for group in np.array_split(many, min(MAX_GROUPS, len(many)) or 1) if len(group)]
    lines = [Line("single images", run.series(f"{VIEWS}1"), color(1), detail=120, band=False)] if 1 in numbers else []
    for i, group in enumerate(groups):
        values = defaultdict(list)
        for S in group:
            for step, value in run.series(f"{VIEWS}{S}"):
                values[step].append(value)
        points = [(step, fmean(found)) for step, found in sorted(values.items())]
        label = f"{group[0]} views" if len(group) == 1 else f"{group[0]} to {group[-1]} views"
        shade = f"color-mix(in oklab, var(--ramp-1), var(--ramp-2) {round(100 * i / max(1, len(groups) - 1))}%)"
        lines.append(Line(label, points, shade, detail=120, band=False))
    return Chart("Loss by number of views", lines, "training loss", settling=0.05)


def _against_views(runs: list[Run]) -> Chart:
    lines = []
    for i, run in enumerate(runs):
        recent = {S: [y for x, y in run.series(f"{VIEWS}{S}") if x >= 0.9 * run.step] for S in run.views()}
        points = [(float(S), fmean(values)) for S, values in recent.items() if values]
        lines.append(Line(run.label, points, color(i), dots=True))
    note = "mean of the last tenth of the steps"
    return Chart("Loss against number of views", lines, "training loss", note, x_label="views")

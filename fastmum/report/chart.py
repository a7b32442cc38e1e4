"""A chart as SVG: lines over a plane, legible in light and dark, with its numbers beside it for the page's script."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastmum.report.run import Point
from fastmum.report.scale import Scale, scale_for, write_ticks

WIDTH, HEIGHT = 640, 270  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 10, 34  # of the plane in it
MAX_POINTS = 500  # of a line: more than a screen shows
MAX_DOTS = 40  # of a line: more of them hide it


# Once in a page. A dot more than the plane, so that none is cut at its edge.
PLANE = (
    '<svg class="defs"><clipPath id="plane">'
    f'<rect x="{LEFT - 5}" y="{TOP - 5}" width="{WIDTH - LEFT - RIGHT + 10}" height="{HEIGHT - TOP - BOTTOM + 10}"/>'
    "</clipPath></svg>"
)


@dataclass(frozen=True)
class Line:
    """A row of points.

    Args:
        label: in the legend.
        points: by x.
        color: a CSS colour.
        dots: whether the points are marked, where there are few of them: those of measurements far apart.
        dashed: whether the line is.
        detail: most points; lines with more are drawn as the mean of neighbours within a band of their range.
        band: whether there is that band.
    """

    label: str
    points: list[Point]
    color: str
    dots: bool = False
    dashed: bool = False
    detail: int = MAX_POINTS
    band: bool = True


@dataclass(frozen=True)
class Chart:
    """What is drawn, and how.

    Args:
        title: above it.
        lines: at least one with a point.
        note: of what is shown, below the title.
        x_label: of the axis below.
        percent: whether values are shares.
        from_zero: whether the axis of values begins at 0.
        log: whether it is logarithmic.
        counts: whether values are whole.
        settling: share of every line, from its beginning, that may lie outside of the picture.
    """

    title: str
    lines: list[Line] = field(default_factory=list)
    note: str = ""
    x_label: str = "step"
    percent: bool = False
    from_zero: bool = False
    log: bool = False
    counts: bool = False
    settling: float = 0.0

    def html(self) -> str:
        """A figure: title, legend, drawing, and the numbers for the script."""
        lines = [(line, thin(line.points, line.detail)) for line in self.lines if line.points]
        x = _plain_scale([point[0] for _, points in lines for point in points])
        values = [
            value
            for line, points in lines
            for point in _settled(points, self.settling)
            for value in (point[2:] if line.band else point[1:2])
        ]
        y = scale_for(values, HEIGHT - BOTTOM, TOP, self.from_zero, self.log)
        drawn = [
            _axes(x, y, self.x_label, self.percent, self.counts),
            *(_draw(line, points, x, y) for line, points in lines),
        ]
        clipped = any(point[1] > y.high for _, points in lines for point in points)
        note = "; ".join(part for part in (self.note, "begins above the picture" if clipped else "") if part)
        note = f'<p class="note">{html.escape(note)}</p>' if note else ""
        legend = _legend([line for line, _ in lines]) if len(lines) > 1 else ""
        return (
            f'<figure class="chart"><figcaption><h3>{html.escape(self.title)}</h3>{note}{legend}</figcaption>'
            f'<div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(self.title)}">'
            f"{''.join(drawn)}</svg></div>{self._numbers(lines, x, y)}</figure>"
        )

    def _numbers(self, lines: list[tuple[Line, list[Thinned]]], x: Scale, y: Scale) -> str:
        numbers = {
            "x": [x.low, x.high, x.start, x.end],
            "y": [y.low, y.high, y.start, y.end],
            "log": self.log,
            "percent": self.percent,
            "xLabel": self.x_label,
            "lines": [
                {
                    "label": line.label,
                    "color": line.color,
                    "points": [[_short(a, 9), _short(b)] for a, b, _, _ in points if b > 0 or not self.log],
                }
                for line, points in lines
            ],
        }
        # "</script>" would end the element, whatever stands around it.
        text = json.dumps(numbers, separators=(",", ":")).replace("<", "\\u003c")
        return f'<script type="application/json">{text}</script>'


Thinned = tuple[float, float, float, float]  # x, mean, least, most


def thin(points: list[Point], most: int) -> list[Thinned]:
    """At most `most` points: means of equal numbers of neighbours, with their range; the last x stays the last."""
    size = math.ceil(len(points) / most)
    groups = [points[max(0, end - size) : end] for end in range(len(points), 0, -size)][::-1]
    thinned = []
    for group in groups:
        values = [value for _, value in group]
        thinned.append((group[-1][0], sum(values) / len(values), min(values), max(values)))
    return thinned


def _settled(points: list[Thinned], settling: float) -> list[Thinned]:
    first, last = points[0][0], points[-1][0]
    return [point for point in points if point[0] >= first + settling * (last - first)]


def _plain_scale(values: list[float]) -> Scale:
    low, high = min(values), max(values)
    low = 0.0 if low < 0.2 * high else low  # runs begin at 0
    return Scale(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)


def _axes(x: Scale, y: Scale, x_label: str, percent: bool, counts: bool) -> str:
    parts = []
    ticks = [tick for tick in y.ticks() if tick == int(tick) or not counts]
    for tick, label in zip(ticks, write_ticks(ticks, percent), strict=True):
        at = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at}" dy="0.35em" text-anchor="end">{label}</text>')
    ticks = x.ticks(6)
    for tick, label in zip(ticks, write_ticks(ticks), strict=True):
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - 18}" text-anchor="middle">{label}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{html.escape(x_label)}</text>')
    return "".join(parts)


def _draw(line: Line, points: list[Thinned], x: Scale, y: Scale) -> str:
    shown = [point for point in points if point[2] > 0 or not y.log]
    middle = [(x(a), y(b)) for a, b, _, _ in shown]
    parts = []
    if line.band and any(low < high for _, _, low, high in shown):
        around = [(x(a), y(high)) for a, _, _, high in shown] + [(x(a), y(low)) for a, _, low, _ in reversed(shown)]
        parts.append(f'<path class="band" d="{_path(around)}Z" fill="{line.color}"/>')
    dashes = ' stroke-dasharray="6 4"' if line.dashed else ""
    if len(middle) > 1:
        parts.append(f'<path class="line" d="{_path(middle)}" stroke="{line.color}"{dashes}/>')
    marked = middle if (line.dots and len(middle) <= MAX_DOTS) or len(middle) == 1 else []
    parts += [f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{line.color}"/>' for a, b in marked]
    return f'<g clip-path="url(#plane)">{"".join(parts)}</g>'


def _path(points: Iterable[Point]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)


def _legend(lines: list[Line]) -> str:
    entries = (
        f'<li><i class="{"dashed" if line.dashed else "solid"}" style="color:{line.color}"></i>'
        f"{html.escape(line.label)}</li>"
        for line in lines
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _short(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")

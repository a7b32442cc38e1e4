"""Ratios of a group as bars with their spread, in SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import COMPILED, REFERENCE, Result

COLORS = {REFERENCE: "#2a6fbb", COMPILED: "#c98a1b"}
ROW, MARGIN, WIDTH = 0.36, 1.2, 8.0  # inches
LABEL = 60  # characters
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.4, 2, 3, 5, 10, 20, 50, 100)


def draw_ratios(results: Sequence[Result], path: Path) -> None:
    """Bars of reference / fastmum and compiled / fastmum on a logarithmic axis; right of 1 fastmum is better.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastmum", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(WIDTH, MARGIN + ROW * len(results)), layout="constrained")
        over = [name for name in (REFERENCE, COMPILED) if any(result.ratio(name) for result in results)]
        values = [1.0]
        for i, name in enumerate(over):
            height = 0.76 / len(over)
            ratios = [(row, r) for row, result in enumerate(results) if (r := result.ratio(name))]
            at = [row + (i - (len(over) - 1) / 2) * height for row, _ in ratios]
            middle = [ratio.median for _, ratio in ratios]
            around = [[r.median - r.low for _, r in ratios], [r.high - r.median for _, r in ratios]]
            axes.barh(
                at, [value - 1 for value in middle], 0.9 * height, left=1, color=COLORS[name], label=f"{name} / fastmum"
            )
            axes.errorbar(middle, at, xerr=around, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
            values += [value for _, ratio in ratios for value in (ratio.low, ratio.high)]
        low, high = 0.9 * min(values), 1.1 * max(values)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        ticks = [tick for tick in TICKS if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(results)), [_short(result.what) for result in results])
        axes.invert_yaxis()
        axes.set_xlabel("times better than the reference: medians of rounds, with the spread of the table")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _short(text: str) -> str:
    return text if len(text) <= LABEL else text[: LABEL - 1] + "…"

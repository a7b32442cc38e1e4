"""Figures of runs for talks: every chart and the reconstructions as PDF, PNG, or GIF."""

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmum.errors import FastmumError, writing
from fastmum.files import write_atomic
from fastmum.report.charts import GRID, INK, STYLE, Chart, report_charts
from fastmum.report.page import open_picture, shown_steps
from fastmum.report.run import Run

FORMATS = "pdf", "png", "gif"
SIZE, DPI = (6.4, 3.6), 200  # inches, pixels per inch
FRAMES = 40  # of the GIF of a chart, which is drawn from left to right
FRAME_MS, PICTURE_MS, LAST_MS = 60, 600, 3000  # how long a frame of a chart, a reconstruction, and the last frame stay
INKS = {INK[0]: "black", GRID[0]: "#dddddd"}  # for placeholders
STYLE_OF_FIGURES: dict[Any, Any] = {key: INKS.get(value, value) for key, value in STYLE.items()}
STYLE_OF_FIGURES |= {"pdf.fonttype": 42, "text.parse_math": False}  # fonts that can be edited; names with $ are text


def write_figures(folder: Path, runs: list[Run], kind: str) -> list[Path]:
    """Write the charts of runs and their reconstructions into a folder, in one of `FORMATS`; returns the files.

    A GIF of a chart draws it from left to right; one of reconstructions shows them step by step, the others the newest.
    FastmumError: the folder cannot be written to.
    """
    import matplotlib

    files = []
    with matplotlib.rc_context(STYLE_OF_FIGURES), writing(folder, FastmumError):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in _contents(runs, kind):
            files.append(folder / f"{name}.{kind}")
            write_atomic(files[-1], content)
    return files


def _contents(runs: list[Run], kind: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each figure."""
    for chart in report_charts(runs):
        yield re.sub(r"\W+", "_", chart.title.lower()), _draw(chart, kind)
    for i, run in enumerate(runs, 1):
        steps = shown_steps(run) if kind == "gif" else [*run.pictures][-1:]
        side = 1280 if kind == "gif" else 1 << 16
        if pictures := [found for step in steps if (found := open_picture(run.pictures[step], side))]:
            name = "reconstruction" if len(runs) == 1 else f"reconstruction_{i}"
            yield name, _encode([each.resize(pictures[-1].size) for each in pictures], kind, PICTURE_MS)


def _draw(chart: Chart, kind: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    chart.draw(axes, {line.color: _color(line.color) for line in chart.lines})
    axes.set_title(chart.title, loc="left")
    if sum(bool(line.points) for line in chart.lines) > 1:
        axes.legend(frameon=False, fontsize="small")
    if kind != "gif":
        content = io.BytesIO()
        figure.savefig(content, format=kind)
        return content.getvalue()

    def pixels() -> np.ndarray:
        canvas.draw()
        return np.array(canvas.buffer_rgba())[..., :3]

    whole = pixels()
    for artist in (*axes.lines, *axes.collections):
        artist.set_visible(False)
    both = Image.fromarray(np.concatenate([whole, pixels()])).quantize()  # one palette
    drawn, empty = np.split(np.asarray(both), 2)
    left, right = axes.get_window_extent().intervalx
    edges, columns = [*np.linspace(left, right, FRAMES), whole.shape[1]], np.arange(whole.shape[1])
    frames = [Image.fromarray(np.where(columns < edge, drawn, empty)) for edge in edges]
    for frame in frames:
        frame.putpalette(both.getpalette() or b"")
    return _encode(frames, kind, FRAME_MS)


def _encode(pictures: Sequence[Image.Image], kind: str, milliseconds: int) -> bytes:
    """A file with the pictures one after another, each shown for that long; with the last one if it is no GIF."""
    content, more = io.BytesIO(), {}
    if kind == "gif":
        durations = [*[milliseconds] * (len(pictures) - 1), LAST_MS]
        more = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    pictures[0 if more else -1].save(content, kind, **more)
    return content.getvalue()


def _palette() -> dict[str, str]:
    """Colours of the page's light theme, by CSS name."""
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return dict(reversed(re.findall(r"(--[\w-]+): (#\w{6})", page)))  # the first of each name


def _color(css: str) -> tuple[float, ...]:
    """RGB of a line's CSS colour: a variable of the page, or a mixture of two."""
    from matplotlib.colors import to_rgb

    names, share = re.findall(r"--[\w-]+", css), re.search(r"(\d+)%", css)
    palette = _palette()
    first, last = (np.array(to_rgb(palette[name])) for name in (names[0], names[-1]))
    return tuple(first + (last - first) * (int(share[1]) / 100 if share else 0))

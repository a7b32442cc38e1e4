"""A page with a point cloud to turn and its cameras, in one file: plotly.js is inside."""

import base64
import importlib.util
from html import escape
from typing import Any

import numpy as np

from fastmum.errors import FastmumError
from fastmum.geometry import Camera
from fastmum.geometry.camera import rigid_inverse, transform

FRUSTUM = 0.04  # depth of a frustum over the extent of the cloud
CAMERA_COLOUR, FIRST_COLOUR = "#d62728", "#1f77b4"
GAP = np.full((1, 3), np.nan)  # between lines
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>html, body {{ margin: 0; height: 100%; font: 14px system-ui, sans-serif; }}
body {{ display: flex; flex-direction: column; }} p {{ margin: 8px 12px; }} .cloud {{ flex: 1; min-height: 0; }}</style>
</head><body><p><b>{title}</b> – {note}. Drag turns, the wheel zooms, a right drag moves.</p>
<div class="cloud">{plot}</div></body></html>
"""


def require_plotly(otherwise: str) -> None:
    """FastmumError if plotly is not installed."""
    if importlib.util.find_spec("plotly") is None:
        raise FastmumError(f"the page with the point cloud needs plotly: pip install 'fastmum[viewer]', or {otherwise}")


def viewer(xyz: np.ndarray, rgb: np.ndarray, cameras: list[Camera], names: list[str], title: str) -> str:
    """The HTML of points (N, 3), colours (N, 3) uint8 and cameras as frustums, the first in another colour."""
    from plotly.io import to_html

    low, high = np.percentile(xyz, [2, 98], axis=0) if len(xyz) else (np.zeros(3), np.ones(3))
    size = FRUSTUM * float(np.linalg.norm(high - low))
    colours = [f"rgb({r},{g},{b})" for r, g, b in rgb.tolist()]
    data: list[dict[str, Any]] = [
        {"type": "scatter3d", "mode": "markers", "name": "points", "hoverinfo": "skip", **_axes(xyz),
         "marker": {"size": 1.5, "color": colours}}
    ]  # fmt: skip
    for part, colour in ((slice(1), FIRST_COLOUR), (slice(1, None), CAMERA_COLOUR)):
        lines = [np.vstack([frustum(camera, size), GAP]) for camera in cameras[part]]
        text = [name for name, line in zip(names[part], lines, strict=True) for _ in line]
        if lines:
            data.append(
                {"type": "scatter3d", "mode": "lines", "name": "cameras", "text": text, "hoverinfo": "text",
                 **_axes(np.concatenate(lines)), "line": {"width": 2, "color": colour}}
            )  # fmt: skip
    hidden = {"visible": False}
    scene = {
        "aspectmode": "data", "xaxis": hidden, "yaxis": hidden, "zaxis": hidden,  # OpenCV's axes: y is down
        "camera": {"up": {"x": 0, "y": -1, "z": 0}, "eye": {"x": 0.3, "y": -0.5, "z": -1.4}},
    }  # fmt: skip
    layout = {"showlegend": False, "margin": dict.fromkeys("lrtb", 0), "scene": scene}
    options = {"displaylogo": False, "responsive": True, "scrollZoom": True}
    plot = to_html({"data": data, "layout": layout}, options, include_plotlyjs=True, full_html=False, validate=False)
    note = f"{len(xyz):,} points, {len(cameras):,} cameras (the first in blue)"
    return PAGE.format(title=escape(title), note=note, plot=plot)


def frustum(camera: Camera, size: float) -> np.ndarray:
    """A line (11, 3) around the pyramid of a camera whose image plane is at depth `size`, in the world."""
    width, height = camera.size
    pixels = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], np.float64)
    corners = size * pixels @ np.linalg.inv(camera.K).T
    a, b, c, d = transform(rigid_inverse(camera.camera_from_world), corners)
    (o,) = transform(rigid_inverse(camera.camera_from_world), np.zeros((1, 3)))
    return np.stack([o, a, b, o, c, b, c, d, o, a, d])


def _axes(points: np.ndarray) -> dict[str, Any]:
    """Coordinates as plotly.js reads them from base64."""
    columns = np.ascontiguousarray(points.T, "<f4")
    return {
        axis: {"dtype": "f4", "bdata": base64.b64encode(column).decode()}
        for axis, column in zip("xyz", columns, strict=True)
    }

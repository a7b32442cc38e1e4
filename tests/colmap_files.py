"""Tiny COLMAP models for tests, written by hand: the points that each image sees, and the camera's heading."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest


class View(NamedTuple):
    """An image: ids of the points it sees, and the heading of its camera about the vertical, in degrees."""

    points: tuple[int, ...]
    heading: float = 0.0


def write_text_model(folder: Path, views: Mapping[str, View]) -> Path:
    """The three files; images are numbered 1, 2, ..., and the origin lies 1 in front of each camera."""
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text("# a comment\n1 PINHOLE 640 480 500 510 320 240\n")
    tracks: dict[int, str] = {}
    images = ""
    for number, (name, view) in enumerate(views.items(), start=1):
        half = math.radians(view.heading) / 2
        features = "".join(f" {10 * i} 5 {point}" for i, point in enumerate(view.points))
        images += f"{number} {math.cos(half)} 0 {math.sin(half)} 0 0 0 1 1 {name}\n"
        images += f"1 1 -1{features}\n"  # the first feature has no point
        for i, point in enumerate(view.points, start=1):
            tracks[point] = f"{tracks.get(point, '')} {number} {i}"
    (folder / "images.txt").write_text(images)
    (folder / "points3D.txt").write_text("".join(f"{p} 0 0 9 0 0 0 0.5{track}\n" for p, track in tracks.items()))
    return folder


def convert_to_binary(folder: Path, rigs: bool = True) -> Path:
    """Replace a text model by a binary one, without rigs and frames as COLMAP wrote it before version 3.12."""
    reconstruction = pytest.importorskip("pycolmap").Reconstruction(folder)
    for file in folder.iterdir():
        file.unlink()
    reconstruction.write_binary(folder)
    for name in () if rigs else ("rigs", "frames"):
        (folder / f"{name}.bin").unlink()
    return folder

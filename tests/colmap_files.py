"""Tiny COLMAP models for tests, written by hand: who sees which points, and where each camera turns to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest


class View(NamedTuple):
    """An image: the points it sees and the turn of its camera about the vertical, in degrees."""

    points: tuple[int, ...]
    heading: float = 0.0


def write_text_model(folder: Path, views: Mapping[str, View]) -> Path:
    """The three files; images are numbered 1, 2, ..., and the origin lies 1 in front of each camera."""
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text("# a comment\n1 PINHOLE 640 480 500 510 320 240\n")
    tracks: dict[int, list[tuple[int, int]]] = {}
    lines = []
    for number, (name, view) in enumerate(views.items(), start=1):
        half = math.radians(view.heading) / 2
        lines.append(f"{number} {math.cos(half)} 0 {math.sin(half)} 0 0 0 1 1 {name}")
        features = [f"{10 * i} 5 {point}" for i, point in enumerate(view.points)]
        lines.append(" ".join(["1 1 -1", *features]))  # the first feature has no point
        for i, point in enumerate(view.points, start=1):
            tracks.setdefault(point, []).append((number, i))
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    (folder / "points3D.txt").write_text(
        "".join(
            f"{point} 0 0 9 0 0 0 0.5 " + " ".join(f"{image} {feature}" for image, feature in track) + "\n"
            for point, track in tracks.items()
        )
    )
    return folder


def convert_to_binary(folder: Path, rigs: bool = True) -> Path:
    """Replace a text model by a binary one; without rigs and frames it is as COLMAP wrote them before version 3.12."""
    pycolmap = pytest.importorskip("pycolmap")
    reconstruction = pycolmap.Reconstruction(folder)
    for file in folder.iterdir():
        file.unlink()
    reconstruction.write_binary(folder)
    if not rigs:
        (folder / "rigs.bin").unlink()
        (folder / "frames.bin").unlink()
    return folder

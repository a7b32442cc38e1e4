"""A room while it is being furnished: what has been placed so far, and whether one more piece fits.

World frame: z up, metres, the floor at z = 0 with the room's middle above the origin. Nothing is placed within a margin
of the camera path, so that no camera is ever inside an object.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fastmum.scenes.parts import Palette, Part, as_solids, lifted
from fastmum.scenes.paths import Path

MARGIN = 0.45  # metres between a camera and anything
AHEAD = 0.95  # the same in front of a camera, where a near thing would fill the picture


class Room:
    """What has been placed so far, and whether one more piece fits."""

    def __init__(self, palette: Palette, length: float, width: float, height: float, path: Path) -> None:
        self.palette, self.rng = palette, palette.rng
        self.size = np.array([length, width, height])
        self.parts: list[Part] = []
        self.standing: list[Part] = []  # what stands on the floor
        self.taken: list[tuple[float, float, float]] = []  # floor before a door, to be kept free: x, y, radius
        self.hung: list[tuple[int, float, float]] = []  # doors, windows and pictures: wall, place along it, width
        self.eye_V3, look_V3 = path.eyes(np.linspace(0, 1, 49))
        self.look_V3 = look_V3

    def clear_of_path(self, parts: list[Part]) -> bool:
        """No part within the margin of a camera."""
        solids = as_solids(parts)
        near = solids.distance_SN(self.eye_V3.astype(np.float32)) < MARGIN
        ahead = solids.distance_SN((self.eye_V3 + 0.55 * self.look_V3).astype(np.float32)) < AHEAD - MARGIN
        return not (near.any() or ahead.any())

    def add(self, parts: list[Part]) -> bool:
        """Places a piece that stands on the floor if nothing is in its way."""
        solids = as_solids(parts)
        grid = np.linspace(-1, 1, 5, dtype=np.float32)
        square_N3 = np.stack([*np.meshgrid(grid, grid), np.zeros((5, 5), np.float32)], -1).reshape(-1, 3)
        foot_N3 = (solids.centre_S3[:, None] + (square_N3 * solids.half_S3[:, None]) @ solids.axes_S33).reshape(-1, 3)
        if (np.abs(foot_N3[:, :2]) > self.size[:2] / 2 + 0.01).any() or not self.clear_of_path(parts):
            return False
        if any((np.hypot(foot_N3[:, 0] - x, foot_N3[:, 1] - y) < r).any() for x, y, r in self.taken):
            return False
        if self.standing:
            foot_N3[:, 2] = 0  # compared on the floor plan: every solid standing there is taken as endlessly tall
            tall = [replace(p, centre=(*p.centre[:2], 0.0), half=(*p.half[:2], 9.0)) for p in self.standing]
            if (as_solids(tall).distance_SN(foot_N3) < 0.05).any():
                return False
        self.parts += parts
        self.standing += parts
        return True

    def scatter(self, piece: list[Part], nearest: float) -> None:
        """Places a piece in the open at least about `nearest` metres ahead of some camera, if a few tries find room."""
        rng = self.rng
        for _ in range(14):
            v = rng.integers(0, len(self.eye_V3))
            place = self.eye_V3[v] + self.look_V3[v] * rng.uniform(nearest, 3.6) + rng.normal(0, 0.4, 3)
            x, y = np.clip(place[:2], -self.size[:2] / 2 + 0.7, self.size[:2] / 2 - 0.7)
            if self.add(lifted(piece, x, y, 0, rng.uniform(0, 2 * np.pi))):
                return

    def wall(self, which: int) -> tuple[float, float, float, float]:
        """(yaw of a piece whose back is to the wall, unit normal x and y into the room, half length of the wall)."""
        yaw = which * np.pi / 2
        return yaw, float(np.sin(yaw)), float(-np.cos(yaw)), float(self.size[which % 2] / 2)

    def at_wall(self, which: int, along: float, out: float) -> tuple[float, float]:
        """The floor point `out` metres in front of a wall, `along` its length from the middle."""
        yaw, nx, ny, _ = self.wall(which)
        depth = self.size[1 - which % 2] / 2 - out
        return float(-nx * depth + np.cos(yaw) * along), float(-ny * depth + np.sin(yaw) * along)

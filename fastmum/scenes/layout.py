"""A whole scene from a seed: the room, what stands in it, the light and the camera path.

World frame: z up, metres, the floor at z = 0 with the room's middle above the origin. The path is drawn first and the
room furnished around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmum.scenes.fixtures import fit_out, hang_pictures, wall_paint
from fastmum.scenes.furniture import PIECES, pillar
from fastmum.scenes.light import Lamp, Lighting
from fastmum.scenes.parts import Paint, Palette, Part, as_solids, ball, box, lifted
from fastmum.scenes.paths import Path, draw_path
from fastmum.scenes.room import Room
from fastmum.scenes.shapes import SHELL, Solids
from fastmum.scenes.textures import shade

# Hues that rooms are painted in: warm earth colours and blues more often than the rest.
HUES = (0.02, 0.06, 0.09, 0.11, 0.14, 0.3, 0.42, 0.52, 0.57, 0.6, 0.63, 0.95)


@dataclass(frozen=True)
class Kind:
    """What furnishes a kind of place: names of pieces in the open and along the walls, how many of each, pictures."""

    free: tuple[str, ...]
    at_wall: tuple[str, ...]
    free_count: int
    wall_count: int
    pictures: int
    rug: bool = False


KINDS = {
    "living": Kind(("table", "plant", "stool", "bench"), ("shelf", "cabinet", "sofa", "plant", "sofa"), 5, 11, 8, True),
    "storage": Kind(("crates", "barrels", "crates", "table"), ("shelf", "crates", "shelf", "cabinet"), 7, 12, 8),
    "gallery": Kind(("pedestal", "bench", "steps"), ("steps", "plant", "cabinet", "sofa"), 7, 5, 12, True),
    "library": Kind(("table", "bench", "stool", "pedestal"), ("shelf", "shelf", "cabinet", "shelf"), 5, 12, 8, True),
    "courtyard": Kind(
        ("plant", "bench", "barrels", "crates", "table", "pedestal"), ("plant", "crates", "steps", "bench"), 8, 11, 6
    ),
}


@dataclass(frozen=True)
class Scene:
    """Everything there is to render: parts[i] is the paint of solid i."""

    kind: str
    parts: list[Part]
    solids: Solids
    lighting: Lighting
    path: Path
    open_top: bool
    reach: float  # metres: no visible point is farther from any camera


def build_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of a seed; the same whatever else is rendered."""
    rng = np.random.default_rng([seed, index, 1])
    kind = list(KINDS)[(index + int(rng.integers(0, 2))) % len(KINDS)]
    open_top = kind == "courtyard"
    length, width = (float(x) for x in rng.uniform(4.8, 7.6, 2) + (1.4 if open_top else 0.0))
    height = float(rng.uniform(2.1, 2.8) if open_top else rng.uniform(2.5, 3.5))
    palette = Palette(rng, float(rng.choice(HUES)), float(rng.uniform(0.055, 0.1)), float(rng.uniform(0.5, 0.8)))
    path = draw_path(rng, length, width, height)
    room = Room(palette, length, width, height, path)
    lamps = fit_out(room, kind)
    hang_pictures(room, KINDS[kind].pictures)
    _furnish(room, kind)
    shell = Part(SHELL, (0.0, 0.0, height / 2), (length / 2, width / 2, height / 2), wall_paint(palette, kind))
    parts = [shell, *room.parts]
    if open_top:
        parts += _beyond(palette, length, width, height)
    solids = as_solids(parts)
    reach = float(np.sqrt((solids.corners_S83() ** 2).sum(-1)).max()) + float(np.hypot(length, width)) / 2 + 2
    return Scene(kind, parts, solids, _lighting(rng, open_top, lamps), path, open_top, reach)


def _furnish(room: Room, kind: str) -> None:
    """Pieces along the walls and in the open, most of them where the cameras look."""
    place, rng, p = KINDS[kind], room.rng, room.palette
    for _ in range(place.wall_count):
        piece = PIECES[str(rng.choice(place.at_wall))](p)
        deep = max(q.centre[1] + q.half[1] for q in piece)
        for _ in range(6):
            which = int(rng.integers(0, 4))
            yaw, _, _, half = room.wall(which)
            along = float(rng.uniform(-0.85, 0.85) * half)
            x, y = room.at_wall(which, along, deep + 0.03)
            if room.add(lifted(piece, x, y, 0, yaw)):
                break
    if rng.random() < 0.3:
        room.scatter(pillar(p, room.size[2]), 2.0)
    for _ in range(place.free_count):
        room.scatter(PIECES[str(rng.choice(place.free))](p), 1.5)
    if place.rug:
        rug = box(*rng.uniform(-0.8, 0.8, 2), 0.01, rng.uniform(1.4, 2.6), rng.uniform(1.2, 2.0), 0.008, p.cloth())
        room.parts += [rug]


def _beyond(p: Palette, length: float, width: float, height: float) -> list[Part]:
    """Buildings and trees outside a courtyard's walls."""
    rng, parts = p.rng, []
    for which in range(int(rng.integers(3, 6))):
        angle = which * 1.3 + rng.uniform(-0.4, 0.4)
        away = max(length, width) / 2 + rng.uniform(3.5, 6.0)
        w, h = rng.uniform(2.0, 4.0), height + rng.uniform(1.0, 4.0)
        facade = Paint("facade", p.near(0.05, 0.2, 0.75), p.near(0.5, 0.15, 0.8))
        parts.append(box(away * np.cos(angle), away * np.sin(angle), 0, w, 2.0, h, facade, yaw=angle + np.pi / 2))
    for _ in range(rng.integers(2, 5)):
        angle, r = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.3)
        away = max(length, width) / 2 + rng.uniform(1.6, 2.4)
        green = Paint("leaves", shade(rng, 0.28, 0.45, 0.4), shade(rng, 0.22, 0.45, 0.6))
        parts.append(ball(away * np.cos(angle), away * np.sin(angle), height - 0.4, r, green, 1.2))
    return parts


def _lighting(rng: np.random.Generator, open_top: bool, lamps: list[Lamp]) -> Lighting:
    """Indoors the lamps and a little of everything; outdoors the sun and the sky's blue."""
    if not open_top:
        return Lighting(tuple(lamps), np.array([0.50, 0.48, 0.46]) * rng.uniform(0.35, 0.75))
    azimuth, up = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1.15)
    sun = np.array([np.cos(azimuth) * np.cos(up), np.sin(azimuth) * np.cos(up), np.sin(up)])
    return Lighting((), np.array([0.30, 0.35, 0.43]), sun, np.array([1.3, 1.18, 0.98]) * rng.uniform(0.8, 1.1))

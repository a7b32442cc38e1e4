"""A whole scene from a seed: the room, what stands in it, the light and the camera path.

World frame: z up, metres, the floor at z = 0 with the room's middle above the origin. The path is drawn first; nothing
is then placed within a margin of it, so that no camera is ever inside an object.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmum.data.scenes.furniture import AT_WALL, FREE, Paint, Palette, Part, ball, box, drum, lifted, pillar
from fastmum.data.scenes.light import Lamp, Lighting
from fastmum.data.scenes.paths import Path, draw_path
from fastmum.data.scenes.shapes import SHELL, Solids
from fastmum.data.scenes.textures import shade

MARGIN = 0.45  # metres between a camera and anything
AHEAD = 0.95  # the same in front of a camera, where a near thing would fill the picture

# What furnishes each kind of place: pieces in the open, pieces along the walls, how many of each.
KINDS = {
    "living": (("table", "plant", "stool", "bench", "table"), ("shelf", "cabinet", "sofa", "plant", "shelf"), 4, 8),
    "storage": (("crates", "barrels", "crates", "table"), ("shelf", "crates", "shelf", "cabinet"), 6, 8),
    "gallery": (("pedestal", "bench", "pedestal", "steps"), ("steps", "plant", "cabinet"), 6, 4),
    "library": (("table", "bench", "stool", "pedestal"), ("shelf", "shelf", "cabinet", "shelf"), 4, 10),
    "courtyard": (
        ("plant", "bench", "barrels", "crates", "table", "steps"),
        ("plant", "crates", "steps", "plant"),
        7,
        8,
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
    height = float(rng.uniform(2.2, 3.2) if open_top else rng.uniform(2.5, 3.5))
    palette = Palette(rng, float(rng.random()), float(rng.uniform(0.055, 0.1)), float(rng.uniform(0.5, 0.8)))
    path = draw_path(rng, length, width, height)
    room = _Room(palette, length, width, height, path)
    lamps = _fixtures(room, kind)
    _pictures(room, 9 if kind == "gallery" else 5)
    _furnish(room, kind)
    shell = Part(SHELL, (0.0, 0.0, height / 2), (length / 2, width / 2, height / 2), _wall_paint(palette, kind))
    parts = [shell, *room.parts]
    reach = float(np.sqrt(length**2 + width**2 + height**2))
    if open_top:
        outside = _beyond(palette, length, width, height)
        parts += outside
        reach = max(float(np.hypot(np.hypot(*p.centre[:2]) + max(p.half) * 1.8 + 3, 8.0)) for p in outside)
    return Scene(kind, parts, as_solids(parts), _lighting(rng, open_top, lamps, height), path, open_top, reach)


def as_solids(parts: list[Part]) -> Solids:
    """The geometry of parts as arrays."""
    cosine, sine = (f([p.yaw for p in parts]).astype(np.float32) for f in (np.cos, np.sin))
    axes = np.zeros((len(parts), 3, 3), np.float32)
    axes[:, 0, 0], axes[:, 0, 1], axes[:, 1, 0], axes[:, 1, 1], axes[:, 2, 2] = cosine, sine, -sine, cosine, 1
    return Solids(
        np.array([p.kind for p in parts], np.int8),
        np.array([p.centre for p in parts], np.float32),
        np.array([p.half for p in parts], np.float32),
        axes,
    )


class _Room:
    """What has been placed so far, and whether one more piece fits."""

    def __init__(self, palette: Palette, length: float, width: float, height: float, path: Path) -> None:
        self.palette, self.rng = palette, palette.rng
        self.size = np.array([length, width, height])
        self.parts: list[Part] = []
        self.taken: list[tuple[float, float, float]] = []  # footprints on the floor: x, y, radius
        self.eye_V3, look_V3 = path.eyes(np.linspace(0, 1, 49))
        self.look_V3 = look_V3

    def clear_of_path(self, parts: list[Part]) -> bool:
        """No part within the margin of a camera."""
        solids = as_solids(parts)
        near = solids.distance_SN(self.eye_V3.astype(np.float32)) < MARGIN
        ahead = solids.distance_SN((self.eye_V3 + 0.55 * self.look_V3).astype(np.float32)) < AHEAD - MARGIN
        return not (near.any() or ahead.any())

    def add(self, parts: list[Part], x: float, y: float, gap: float) -> bool:
        """Places a piece standing on the floor around (x, y) if it fits."""
        reach = max(float(np.hypot(p.centre[0] - x, p.centre[1] - y) + np.hypot(*p.half[:2])) for p in parts) * 0.85
        if any(np.hypot(x - a, y - b) < (reach + r) * gap for a, b, r in self.taken) or not self.clear_of_path(parts):
            return False
        self.parts += parts
        self.taken.append((x, y, reach))
        return True

    def wall(self, which: int) -> tuple[float, float, float, float]:
        """(yaw of a piece whose back is to the wall, unit normal x and y into the room, half length of the wall)."""
        yaw = which * np.pi / 2
        return yaw, float(np.sin(yaw)), float(-np.cos(yaw)), float(self.size[which % 2] / 2)

    def at_wall(self, which: int, along: float, out: float) -> tuple[float, float]:
        """The floor point `out` metres in front of a wall, `along` its length from the middle."""
        yaw, nx, ny, _ = self.wall(which)
        depth = self.size[1 - which % 2] / 2 - out
        return float(-nx * depth + np.cos(yaw) * along), float(-ny * depth + np.sin(yaw) * along)


def _wall_paint(p: Palette, kind: str) -> Paint:
    """The shell's material; floor and ceiling are covered by slabs of their own."""
    rng, value = p.rng, p.rng.uniform(0.62, 0.86)
    a, b = p.near(0, rng.uniform(0.05, 0.35), value), p.near(0.06, rng.uniform(0.1, 0.4), value * 0.85)
    choice = rng.random()
    if kind in ("courtyard", "storage") and choice < 0.6:
        brick = shade(rng, 0.04, 0.45, 0.6), shade(rng, 0.07, 0.35, 0.72)
        return Paint("tiles", *brick, {"size": (rng.uniform(0.22, 0.36), rng.uniform(0.075, 0.12)), "bond": 0.5})
    if choice < 0.75:
        return Paint("plaster", a, b)
    return Paint("concrete", a, b)


def _floor_paint(p: Palette, kind: str) -> Paint:
    rng, value = p.rng, p.rng.uniform(0.5, 0.75)
    a, b = p.near(0.08, 0.18, value), p.near(0.05, 0.25, value * 0.72)
    if kind == "courtyard":
        name = str(rng.choice(["grass", "gravel", "tiles"]))
        if name == "grass":
            return Paint("matter", shade(rng, 0.24, 0.45, 0.5), shade(rng, 0.19, 0.4, 0.62), {"name": f"{name}.png"})
        if name == "gravel":
            return Paint("matter", shade(rng, 0.1, 0.15, 0.62), shade(rng, 0.08, 0.25, 0.5), {"name": f"{name}.png"})
    elif rng.random() < 0.5:
        return p.wood()
    if rng.random() < 0.25:
        return Paint("marble", a, b)
    side = rng.uniform(0.25, 0.6)
    return Paint("tiles", a, b, {"size": (side, side * rng.choice([1.0, 0.5])), "bond": rng.choice([0.0, 0.5])})


def _fixtures(room: _Room, kind: str) -> list[Lamp]:
    """Floor, ceiling, skirting, doors, windows and lamps; returns the sources of light."""
    p, rng = room.palette, room.rng
    length, width, height = room.size
    room.parts.append(box(0, 0, 0.002, length + 0.1, width + 0.1, 0.008, _floor_paint(p, kind)))
    if kind != "courtyard":
        pale = Paint("plaster", p.near(0.1, 0.06, 0.85), p.near(0.1, 0.1, 0.75))
        room.parts.append(box(0, 0, height - 0.01, length + 0.1, width + 0.1, 0.008, pale))
    trim = p.paint()
    for which in range(4):
        yaw, _, _, half = room.wall(which)
        x, y = room.at_wall(which, 0, 0.01)
        room.parts += lifted([box(0, 0, 0, 2 * half, 0.02, rng.uniform(0.08, 0.16), trim)], x, y, 0, yaw)
    if kind == "courtyard":
        coping = p.stone()
        for which in range(4):
            yaw, _, _, half = room.wall(which)
            x, y = room.at_wall(which, 0, 0.0)
            room.parts += lifted([box(0, 0, 0, 2 * half + 0.3, 0.34, 0.12, coping)], x, y, height - 0.06, yaw)
    order, lamps = rng.permutation(4), []
    for which in order[: rng.integers(1, 3)]:
        yaw, _, _, half = room.wall(which)
        along = float(rng.uniform(-0.55, 0.55) * half)
        x, y = room.at_wall(which, along, 0.03)
        tall = min(2.05, height - 0.25)
        wood = Paint("door", p.near(0.5, 0.3, 0.6), p.near(0.5, 0.4, 0.45))
        room.parts += lifted(
            [box(0, 0.01, 0, 0.98, 0.04, tall + 0.06, trim), box(0, 0, 0, 0.84, 0.06, tall, wood)], x, y, 0, yaw
        )
        room.taken.append((*room.at_wall(which, along, 0.3), 0.5))
    if kind == "courtyard":
        return []
    for which in order[2 : 2 + rng.integers(1, 3)]:
        yaw, nx, ny, half = room.wall(which)
        along, wide, tall = float(rng.uniform(-0.4, 0.4) * half), rng.uniform(1.0, 1.9), rng.uniform(0.9, 1.3)
        x, y = room.at_wall(which, along, 0.02)
        pane = Paint("panes", p.near(0, 0, 0.8), p.near(0, 0.05, 0.85))
        sill = box(0, -0.08, 0.86, wide + 0.1, 0.2, 0.04, trim)
        room.parts += lifted([box(0, 0, 0.9, wide, 0.04, tall, pane, glow=0.92, edge=trim), sill], x, y, 0, yaw)
        half_3 = np.array([abs(ny) * wide / 2 + 0.01, abs(nx) * wide / 2 + 0.01, tall / 2])
        lamps.append(
            Lamp(np.array([x + nx * 0.15, y + ny * 0.15, 0.9 + tall / 2]), half_3, np.array([0.95, 1.0, 1.08]) * 2.2)
        )
        room.taken.append((*room.at_wall(which, along, 0.0), 0.25))
    warm = np.array([1.12, 1.0, 0.84])
    for _ in range(rng.integers(1, 3)):
        x, y = rng.uniform(-0.3, 0.3, 2) * room.size[:2]
        drop = float(rng.uniform(0.15, 0.5))
        shade_colour = shade(rng, 0.11, 0.15, 0.9)
        lamp = [
            drum(x, y, height - drop, 0.012, drop, trim, glow=0.3),
            ball(x, y, height - drop - 0.26, 0.14, Paint("glow", shade_colour, shade_colour), glow=0.97),
        ]
        if room.clear_of_path(lamp):
            room.parts += lamp
            lamps.append(Lamp(np.array([x, y, height - drop - 0.16]), np.full(3, 0.15), warm * 2.0))
    return lamps


def _pictures(room: _Room, count: int) -> None:
    """Frames along the walls, none over another, at about eye height."""
    rng, p, hung = room.rng, room.palette, []
    for _ in range(3 * count):
        which = int(rng.integers(0, 4))
        yaw, _, _, half = room.wall(which)
        wide, tall = rng.uniform(0.35, 1.15), rng.uniform(0.35, 0.95)
        along, z = (
            float(rng.uniform(-0.9, 0.9) * (half - wide / 2)),
            rng.uniform(1.0, max(1.05, room.size[2] - tall - 0.25)),
        )
        x, y = room.at_wall(which, along, 0.02)
        if any(w == which and abs(along - a) < (wide + b) / 2 + 0.12 for w, a, b in hung):
            continue
        if any(np.hypot(x - a, y - b) < r + wide / 2 for a, b, r in room.taken):
            continue
        room.parts += lifted([box(0, 0, z, wide, 0.04, tall, p.print(), edge=p.wood())], x, y, 0, yaw)
        hung.append((which, along, wide))
        if len(hung) == count:
            return


def _furnish(room: _Room, kind: str) -> None:
    """Pieces along the walls and in the open, most of them where the cameras look."""
    free, at_wall, free_count, wall_count = KINDS[kind]
    rng, p = room.rng, room.palette
    for _ in range(wall_count):
        piece = AT_WALL[str(rng.choice(at_wall))](p)
        deep = max(q.centre[1] + q.half[1] for q in piece)
        for _ in range(6):
            which = int(rng.integers(0, 4))
            yaw, _, _, half = room.wall(which)
            along = float(rng.uniform(-0.85, 0.85) * half)
            x, y = room.at_wall(which, along, deep + 0.03)
            if room.add(lifted(piece, x, y, 0, yaw), x, y, 0.9):
                break
    for _ in range(free_count):
        tall = pillar(p, room.size[2]) if rng.random() < 0.12 else None
        piece = tall or FREE[str(rng.choice(free))](p)
        for _ in range(14):
            v = rng.integers(0, len(room.eye_V3))
            place = room.eye_V3[v] + room.look_V3[v] * rng.uniform(1.5, 3.6) + rng.normal(0, 0.4, 3)
            x, y = np.clip(place[:2], -room.size[:2] / 2 + 0.7, room.size[:2] / 2 - 0.7)
            if room.add(lifted(piece, x, y, 0, rng.uniform(0, 2 * np.pi)), float(x), float(y), 0.95):
                break
    if kind in ("living", "library", "gallery"):
        rug = box(*rng.uniform(-0.8, 0.8, 2), 0.01, rng.uniform(1.4, 2.6), rng.uniform(1.2, 2.0), 0.008, p.cloth())
        room.parts += [rug]


def _beyond(p: Palette, length: float, width: float, height: float) -> list[Part]:
    """Buildings and trees outside a courtyard's walls."""
    rng, parts = p.rng, []
    for which in range(int(rng.integers(3, 6))):
        angle = which * 1.3 + rng.uniform(-0.4, 0.4)
        away = max(length, width) / 2 + rng.uniform(2.5, 5.0)
        w, h = rng.uniform(2.0, 4.0), height + rng.uniform(1.0, 4.0)
        facade = Paint("tiles", p.near(0, 0.2, 0.7), p.near(0.4, 0.3, 0.5), {"size": (0.9, 1.1), "bond": 0.0})
        parts.append(box(away * np.cos(angle), away * np.sin(angle), 0, w, 2.0, h, facade, yaw=angle + np.pi / 2))
    for _ in range(rng.integers(2, 5)):
        angle, away, r = (
            rng.uniform(0, 2 * np.pi),
            max(length, width) / 2 + rng.uniform(1.6, 2.4),
            rng.uniform(0.8, 1.3),
        )
        green = Paint("leaves", shade(rng, 0.28, 0.45, 0.4), shade(rng, 0.22, 0.45, 0.6))
        parts.append(ball(away * np.cos(angle), away * np.sin(angle), height - 0.4, r, green, 1.2))
    return parts


def _lighting(rng: np.random.Generator, open_top: bool, lamps: list[Lamp], height: float) -> Lighting:
    if not open_top:
        return Lighting(tuple(lamps), np.array([0.50, 0.48, 0.46]) * rng.uniform(0.7, 1.2))
    azimuth, up = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.1)
    sun = np.array([np.cos(azimuth) * np.cos(up), np.sin(azimuth) * np.cos(up), np.sin(up)])
    return Lighting((), np.array([0.40, 0.46, 0.56]), sun, np.array([1.06, 0.98, 0.82]) * rng.uniform(0.7, 1.0))

"""What belongs to the building: surfaces, panelling, beams, doors, windows, lamps and the pictures on the walls."""

from __future__ import annotations

import numpy as np

from fastmum.scenes.light import Lamp
from fastmum.scenes.parts import Paint, Palette, ball, box, drum, lifted
from fastmum.scenes.room import Room
from fastmum.scenes.textures import shade


def wall_paint(p: Palette, kind: str) -> Paint:
    """The walls' material; floor and ceiling are covered by slabs of their own."""
    rng, value = p.rng, p.rng.uniform(0.6, 0.86)
    a, b = p.near(0, rng.uniform(0.05, 0.3), value), p.near(0.04, rng.uniform(0.1, 0.35), value * 0.85)
    rustic = kind in ("courtyard", "storage")
    choice = str(rng.choice(["brick", "concrete", "plaster", "boards"] if rustic else ["plaster", "plaster", "paper"]))
    if choice == "brick":
        brick = shade(rng, 0.04, 0.45, 0.6), shade(rng, 0.07, 0.35, 0.72)
        return Paint("tiles", *brick, {"size": (rng.uniform(0.22, 0.36), rng.uniform(0.075, 0.12)), "bond": 0.5})
    if choice == "boards":
        return Paint("wood", a, b, {"plank": rng.uniform(0.12, 0.25)})
    if choice == "paper":
        return Paint("fabric", a, p.near(0.02, 0.15, value * 0.92))
    return Paint(choice, a, b)


def floor_paint(p: Palette, kind: str) -> Paint:
    """The ground: boards, tiles, marble; outdoors also grass and gravel."""
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
    return Paint(
        "tiles",
        a,
        b,
        {
            "size": (side, side * rng.choice([1.0, 0.5])),
            "bond": rng.choice([0.0, 0.5]),
            "chequered": rng.random() < 0.3,
        },
    )


def fit_out(room: Room, kind: str) -> list[Lamp]:
    """Floor, ceiling, skirting, doors, windows and lamps; returns the sources of light."""
    p, rng = room.palette, room.rng
    length, width, height = room.size
    room.parts.append(box(0, 0, 0.002, length + 0.1, width + 0.1, 0.008, floor_paint(p, kind)))
    if kind != "courtyard":
        pale = Paint("plaster", p.near(0.1, 0.06, 0.85), p.near(0.1, 0.1, 0.75))
        room.parts.append(box(0, 0, height - 0.01, length + 0.1, width + 0.1, 0.008, pale))
        panel, tall = p.wood() if rng.random() < 0.5 else p.paint(), rng.uniform(0.75, 1.0)
        if rng.random() < 0.45:  # panelling below, a rail above it
            for which in range(4):
                yaw, _, _, half = room.wall(which)
                x, y = room.at_wall(which, 0, 0.008)
                rail = box(0, -0.01, tall, 2 * half, 0.03, 0.05, panel)
                room.parts += lifted([box(0, 0, 0, 2 * half, 0.015, tall, panel), rail], x, y, 0, yaw)
        if rng.random() < 0.4:
            timber = p.wood()
            for x in np.arange(-length / 2 + rng.uniform(0.4, 0.9), length / 2, rng.uniform(0.9, 1.4)):
                room.parts.append(box(x, 0, height - 0.15, 0.13, width, 0.15, timber))
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
        room.hung.append((int(which), along, 1.0))
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
        room.hung.append((int(which), along, wide))
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
            lamps.append(Lamp(np.array([x, y, height - drop - 0.16]), np.full(3, 0.15), warm * 2.4))
    return lamps


def hang_pictures(room: Room, count: int) -> None:
    """Frames along the walls, none over another, at about eye height."""
    rng, p, hung = room.rng, room.palette, 0
    for _ in range(3 * count):
        which = int(rng.integers(0, 4))
        yaw, _, _, half = room.wall(which)
        wide = rng.choice([rng.uniform(0.35, 0.9), rng.uniform(0.9, 1.8)])
        tall = min(wide * rng.uniform(0.6, 1.3), 1.25)
        along, z = (
            float(rng.uniform(-0.9, 0.9) * (half - wide / 2)),
            rng.uniform(1.0, max(1.05, room.size[2] - tall - 0.25)),
        )
        x, y = room.at_wall(which, along, 0.02)
        if any(w == which and abs(along - a) < (wide + b) / 2 + 0.12 for w, a, b in room.hung):
            continue
        room.parts += lifted([box(0, 0, z, wide, 0.04, tall, p.print(), edge=p.wood())], x, y, 0, yaw)
        room.hung.append((which, along, wide))
        hung += 1
        if hung == count:
            return

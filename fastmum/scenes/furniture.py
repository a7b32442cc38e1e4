"""Pieces of furniture, each a list of parts in its own frame: x to the right, y to the back, z up from the floor.

Lengths are metres. A piece's front looks towards -y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fastmum.scenes.parts import Paint, Palette, Part, ball, box, drum, lifted
from fastmum.scenes.textures import shade


def clutter(p: Palette, width: float, depth: float, count: int) -> list[Part]:
    """Small things standing about on a top of width x depth."""
    parts: list[Part] = []
    rng = p.rng
    slots = rng.permutation(np.linspace(-0.5, 0.5, count + 2)[1:-1]) * width
    for x in slots.tolist():
        y, kind = float(rng.uniform(-0.25, 0.25) * depth), rng.integers(0, 5)
        if kind == 0:
            parts.append(drum(x, y, 0, rng.uniform(0.04, 0.08), rng.uniform(0.1, 0.25), p.paint()))
        elif kind == 1:
            parts.append(
                ball(x, y, 0, rng.uniform(0.06, 0.12), Paint("marble", p.near(0.5, 0.4, 0.6), p.near(0.5, 0.2, 0.85)))
            )
        elif kind == 2:
            w, h = rng.uniform(0.2, 0.34), rng.uniform(0.2, 0.34)
            parts.append(box(x, y, 0, w, 0.03, h, p.print(), edge=p.wood(), yaw=rng.normal(0, 0.4)))
        elif kind == 3:
            z = 0.0
            for _ in range(rng.integers(2, 4)):
                w, h = rng.uniform(0.2, 0.28), rng.uniform(0.03, 0.06)
                parts.append(box(x, y, z, w, w * 0.72, h, p.paint(), yaw=rng.normal(0, 0.25)))
                z += h
        else:
            side = rng.uniform(0.14, 0.26)
            parts.append(box(x, y, 0, side, side, side * rng.uniform(0.6, 1.1), p.print(), yaw=rng.uniform(-0.7, 0.7)))
    return parts


def table(p: Palette) -> list[Part]:
    """A table with things on it and some stools around."""
    rng = p.rng
    w, d, h = rng.uniform(1.1, 1.8), rng.uniform(0.7, 1.0), rng.uniform(0.68, 0.78)
    top, leg = (p.wood() if rng.random() < 0.7 else p.stone()), p.paint()
    parts = [box(0, 0, h - 0.05, w, d, 0.05, top)]
    if rng.random() < 0.7:
        parts += [
            box(sx * (w / 2 - 0.07), sy * (d / 2 - 0.07), 0, 0.07, 0.07, h - 0.05, leg)
            for sx in (-1, 1)
            for sy in (-1, 1)
        ]
    else:
        parts += [drum(0, 0, 0.06, 0.09, h - 0.11, leg), drum(0, 0, 0, 0.34, 0.06, leg)]
    parts += lifted(clutter(p, w, d, rng.integers(2, 5)), 0, 0, h)
    seat = p.cloth()
    for x in rng.permutation([-0.3, 0.32])[: rng.integers(1, 3)]:
        side = rng.choice([-1, 1])
        parts += lifted(stool(p, seat), x * w, side * (d / 2 + 0.22), 0, rng.uniform(-0.3, 0.3))
    return parts


def stool(p: Palette, seat: Paint | None = None) -> list[Part]:
    """A stool: round or square."""
    seat = seat or p.cloth()
    if p.rng.random() < 0.5:
        return [drum(0, 0, 0, 0.05, 0.42, p.wood()), drum(0, 0, 0.42, 0.2, 0.07, seat)]
    return [box(0, 0, 0, 0.3, 0.3, 0.4, p.wood()), box(0, 0, 0.4, 0.38, 0.38, 0.07, seat)]


def shelf(p: Palette) -> list[Part]:
    """An open shelf against a wall: boards, a back, rows of books and things."""
    rng = p.rng
    w, d = rng.uniform(0.9, 1.6), rng.uniform(0.28, 0.4)
    rows, pitch = int(rng.integers(3, 6)), rng.uniform(0.34, 0.42)
    h, wood = rows * pitch + 0.03, p.wood()
    back = p.paint() if rng.random() < 0.6 else wood
    parts = [box(sx * (w / 2 - 0.015), 0, 0, 0.03, d, h, wood) for sx in (-1, 1)]
    parts.append(box(0, d / 2 - 0.01, 0, w - 0.06, 0.02, h, back))
    for row in range(rows + 1):
        parts.append(box(0, -0.01, row * pitch, w - 0.06, d - 0.02, 0.03, wood))
    for row in range(rows):
        z = row * pitch + 0.03
        if rng.random() < 0.3:
            parts += lifted(clutter(p, w - 0.2, d * 0.5, 2), 0, 0, z)
            continue
        share, depth, tall = rng.uniform(0.45, 0.95), d * rng.uniform(0.6, 0.8), pitch * rng.uniform(0.6, 0.8)
        long = share * (w - 0.08)
        side = rng.choice([-1, 1])
        spines = Paint("books", shade(rng, rng.choice([0.02, 0.09, 0.35, 0.6]), 0.5, 0.6), p.near(0, 0.1, 0.85))
        parts.append(box(side * (w - 0.08 - long) / 2, 0, z, long, depth, tall, spines))
    return parts


def cabinet(p: Palette) -> list[Part]:
    """A closed cabinet or a chest of drawers with things on top."""
    rng = p.rng
    w, d, h = rng.uniform(0.8, 1.6), rng.uniform(0.4, 0.55), rng.uniform(0.7, 1.1)
    front = replace(p.paint() if rng.random() < 0.5 else p.wood(), material="door")
    parts = [box(0, 0, 0.06, w, d, h - 0.06, front), box(0, 0.02, 0, w - 0.08, d - 0.08, 0.06, p.paint())]
    parts.append(box(0, 0, h, w + 0.04, d + 0.03, 0.03, p.wood()))
    return parts + lifted(clutter(p, w, d, rng.integers(2, 4)), 0, 0, h + 0.03)


def sofa(p: Palette) -> list[Part]:
    """A sofa with cushions."""
    rng = p.rng
    w, cloth = rng.uniform(1.4, 2.1), p.cloth()
    parts = [box(0, 0, 0.08, w, 0.8, 0.32, cloth), box(0, 0.32, 0.4, w, 0.2, 0.4, cloth)]
    parts += [box(sx * (w / 2 - 0.09), -0.1, 0.4, 0.18, 0.62, 0.2, cloth) for sx in (-1, 1)]
    for x in np.linspace(-0.32, 0.32, int(rng.integers(2, 4))):
        pillow = p.cloth() if rng.random() < 0.7 else p.print()
        parts.append(box(x * w, 0.12, 0.4, 0.4, 0.14, 0.36, pillow, yaw=rng.normal(0, 0.2)))
    return parts


def crates(p: Palette) -> list[Part]:
    """A heap of crates and boxes, each a little askew."""
    rng, parts = p.rng, []
    side = rng.uniform(0.4, 0.7)
    for x in (-0.55, 0.5)[: rng.integers(1, 3)]:
        z = 0.0
        for level in range(rng.integers(1, 4)):
            s = side * rng.uniform(0.7, 1.0) * (1 - 0.12 * level)
            h = s * rng.uniform(0.6, 1.0)
            paint = [p.wood, p.print, p.paint, p.wood][rng.integers(0, 4)]()
            parts.append(
                box(
                    x * side * 1.2,
                    rng.normal(0, 0.03),
                    z,
                    s,
                    s * rng.uniform(0.8, 1.1),
                    h,
                    paint,
                    yaw=rng.normal(0, 0.3),
                )
            )
            z += h
    return parts


def barrels(p: Palette) -> list[Part]:
    """Drums and a lid or two."""
    rng, parts = p.rng, []
    for x, y in ((-0.35, 0.0), (0.33, 0.1), (0.0, -0.5))[: rng.integers(1, 4)]:
        radius, h = rng.uniform(0.2, 0.3), rng.uniform(0.5, 0.9)
        parts += [drum(x, y, 0, radius, h, p.paint()), drum(x, y, h, radius * 0.9, 0.03, p.paint())]
    return parts


def pedestal(p: Palette) -> list[Part]:
    """A plinth that shows a ball, a cube or a picture."""
    rng, h = p.rng, p.rng.uniform(0.6, 1.1)
    parts = [box(0, 0, 0, 0.46, 0.46, 0.08, p.stone()), box(0, 0, 0.08, 0.38, 0.38, h - 0.08, p.stone())]
    kind = rng.integers(0, 3)
    if kind == 0:
        parts.append(
            ball(0, 0, h, rng.uniform(0.16, 0.26), Paint("marble", p.near(0.5, 0.5, 0.55), p.near(0.55, 0.2, 0.85)))
        )
    elif kind == 1:
        parts.append(box(0, 0, h, 0.3, 0.3, 0.3, p.print(), yaw=rng.uniform(0, 1.5)))
    else:
        parts += [drum(0, 0, h, 0.12, 0.25, p.paint()), ball(0, 0, h + 0.22, 0.17, p.paint())]
    return parts


def plant(p: Palette) -> list[Part]:
    """A pot with a clipped shrub."""
    rng = p.rng
    h, r = rng.uniform(0.3, 0.5), rng.uniform(0.25, 0.4)
    green = Paint("leaves", shade(rng, 0.28, 0.5, 0.4), shade(rng, 0.22, 0.5, 0.65))
    stem = rng.uniform(0.05, 0.4)
    return [
        drum(0, 0, 0, 0.2, h, p.paint()),
        drum(0, 0, h, 0.04, stem, p.wood()),
        ball(0, 0, h + stem - 0.06, r, green, 1.1),
    ]


def steps(p: Palette) -> list[Part]:
    """A flight of broad steps up to a platform with something on it."""
    rng, stone = p.rng, p.stone()
    count, w = int(rng.integers(2, 5)), rng.uniform(1.2, 2.0)
    parts = [box(0, 0.28 * k, 0.17 * k, w, 1.5 - 0.56 * k + 0.56 * count, 0.17, stone) for k in range(count)]
    return parts + lifted(clutter(p, w, 0.4, 2), 0, 0.28 * count, 0.17 * count)


def pillar(p: Palette, height: float) -> list[Part]:
    """A column from floor to `height`, on a foot."""
    shaft, foot = p.stone(), p.stone()
    r = p.rng.uniform(0.14, 0.24)
    body = (
        drum(0, 0, 0.12, r, height - 0.12, shaft)
        if p.rng.random() < 0.6
        else box(0, 0, 0.12, 2 * r, 2 * r, height - 0.12, shaft)
    )
    return [box(0, 0, 0, 2.6 * r, 2.6 * r, 0.12, foot), body]


def bench(p: Palette) -> list[Part]:
    """A plain bench."""
    w, wood = p.rng.uniform(1.1, 1.7), p.wood()
    legs = [box(sx * (w / 2 - 0.15), 0, 0, 0.1, 0.34, 0.4, p.stone()) for sx in (-1, 1)]
    return [*legs, box(0, 0, 0.4, w, 0.4, 0.06, wood)]


PIECES: dict[str, Callable[[Palette], list[Part]]] = {
    f.__name__: f for f in (table, stool, shelf, cabinet, sofa, crates, barrels, pedestal, plant, steps, bench)
}

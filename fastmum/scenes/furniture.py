"""The contents of a room: surfaces, doors, windows, lamps and pictures, then pieces of furniture.

A piece is a list of parts in metres, x to the right, y to the back, z up from the floor; its front faces -y.
"""

from collections.abc import Callable

import numpy as np

from fastmum.scenes.light import Lamp
from fastmum.scenes.room import Paint, Palette, Part, Room, box, cylinder, labelled, moved, sphere
from fastmum.scenes.textures import shade


def wall_paint(p: Palette, kind: str) -> Paint:
    """Paint of the walls of a kind of scene."""
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
    """Paint of the floor of a kind of scene."""
    rng, value = p.rng, p.rng.uniform(0.5, 0.75)
    a, b = p.near(0.08, 0.18, value), p.near(0.05, 0.25, value * 0.72)
    if kind == "courtyard":
        name = str(rng.choice(["grass", "gravel", "tiles"]))
        if name == "grass":
            return Paint("ground", shade(rng, 0.24, 0.45, 0.5), shade(rng, 0.19, 0.4, 0.62), {"name": "grass.png"})
        if name == "gravel":
            return Paint("ground", shade(rng, 0.1, 0.15, 0.62), shade(rng, 0.08, 0.25, 0.5), {"name": "gravel.png"})
    elif rng.random() < 0.5:
        return p.wood()
    if rng.random() < 0.25:
        return Paint("marble", a, b)
    side = rng.uniform(0.25, 0.6)
    size, bond = (side, side * rng.choice([1.0, 0.5])), rng.choice([0.0, 0.5])
    return Paint("tiles", a, b, {"size": size, "bond": bond, "chequered": rng.random() < 0.3})


def add_fixtures(room: Room, kind: str) -> list[Lamp]:
    """Add floor, ceiling, skirting, doors, windows and lamps; returns the light sources."""
    p, rng = room.palette, room.rng
    length, width, height = room.size
    lengths = [(wall, 2 * room.half_length(wall)) for wall in range(4)]
    room.parts.append(box(0, 0, 0.002, length + 0.1, width + 0.1, 0.008, floor_paint(p, kind), label="floor"))
    if kind != "courtyard":
        pale = Paint("plaster", p.near(0.1, 0.06, 0.85), p.near(0.1, 0.1, 0.75))
        room.parts.append(box(0, 0, height - 0.01, length + 0.1, width + 0.1, 0.008, pale, label="ceiling"))
        panel, tall = p.wood() if rng.random() < 0.5 else p.paint(), rng.uniform(0.75, 1.0)
        if rng.random() < 0.45:  # panelling with a rail
            for wall, long in lengths:
                parts = [box(0, 0, 0, long, 0.015, tall, panel), box(0, -0.01, tall, long, 0.03, 0.05, panel)]
                room.parts += labelled(room.moved_to_wall(parts, wall, 0, 0.008), "wall")
        if rng.random() < 0.4:
            timber = p.wood()
            for x in np.arange(-length / 2 + rng.uniform(0.4, 0.9), length / 2, rng.uniform(0.9, 1.4)):
                room.parts.append(box(x, 0, height - 0.15, 0.13, width, 0.15, timber, label="ceiling"))
    trim = p.paint()
    for wall, long in lengths:
        skirting = box(0, 0, 0, long, 0.02, rng.uniform(0.08, 0.16), trim, label="wall")
        room.parts += room.moved_to_wall([skirting], wall, 0, 0.01)
    if kind == "courtyard":
        stone = p.stone()
        for wall, long in lengths:
            coping = box(0, 0, 0, long + 0.3, 0.34, 0.12, stone, label="wall")
            room.parts += room.moved_to_wall([coping], wall, 0, 0.0, height - 0.06)
    order = rng.permutation(4).tolist()
    for wall in order[: rng.integers(1, 3)]:
        along, tall = float(rng.uniform(-0.55, 0.55) * room.half_length(wall)), min(2.05, height - 0.25)
        wood = Paint("door", p.near(0.5, 0.3, 0.6), p.near(0.5, 0.4, 0.45))
        door = [box(0, 0.01, 0, 0.98, 0.04, tall + 0.06, trim), box(0, 0, 0, 0.84, 0.06, tall, wood)]
        room.parts += labelled(room.moved_to_wall(door, wall, along, 0.03), "door")
        room.taken.append((*room.at_wall(wall, along, 0.3), 0.5))
        room.hung.append((wall, along, 1.0))
    if kind == "courtyard":
        return []
    windows = order[2 : 2 + rng.integers(1, 3)]
    return [_add_window(room, wall, trim) for wall in windows] + _add_lamps(room, trim)


def _add_window(room: Room, wall: int, trim: Paint) -> Lamp:
    p, rng = room.palette, room.rng
    along, wide = float(rng.uniform(-0.4, 0.4) * room.half_length(wall)), rng.uniform(1.0, 1.9)
    tall = rng.uniform(0.9, 1.3)
    panes = Paint("panes", p.near(0, 0, 0.8), p.near(0, 0.05, 0.85))
    sill = box(0, -0.08, 0.86, wide + 0.1, 0.2, 0.04, trim)
    window = [box(0, 0, 0.9, wide, 0.04, tall, panes, glow=0.92, edge=trim), sill]
    room.parts += labelled(room.moved_to_wall(window, wall, along, 0.02), "window")
    room.hung.append((wall, along, wide))
    (x, y), (nx, ny) = room.at_wall(wall, along, 0.02), room.normal(wall)
    centre_3 = np.array([x + nx * 0.15, y + ny * 0.15, 0.9 + tall / 2])
    half_3 = np.array([abs(ny) * wide / 2 + 0.01, abs(nx) * wide / 2 + 0.01, tall / 2])
    return Lamp(centre_3, half_3, np.array([0.95, 1.0, 1.08]) * 2.2)


def _add_lamps(room: Room, trim: Paint) -> list[Lamp]:
    rng, height, lamps = room.rng, room.size[2], []
    for _ in range(rng.integers(1, 3)):
        x, y = rng.uniform(-0.3, 0.3, 2) * room.size[:2]
        drop, colour = float(rng.uniform(0.15, 0.5)), shade(rng, 0.11, 0.15, 0.9)
        cord = cylinder(x, y, height - drop, 0.012, drop, trim, glow=0.3)
        lamp = [cord, sphere(x, y, height - drop - 0.26, 0.14, Paint("glow", colour, colour), glow=0.97)]
        if room.clear_of_path(lamp):
            room.parts += labelled(lamp, "lamp")
            warm = np.array([1.12, 1.0, 0.84]) * 2.4
            lamps.append(Lamp(np.array([x, y, height - drop - 0.16]), np.full(3, 0.15), warm))
    return lamps


def hang_pictures(room: Room, count: int) -> None:
    """Hang up to `count` pictures where the walls are free."""
    rng, p, hung = room.rng, room.palette, 0
    for _ in range(3 * count):
        wall = int(rng.integers(0, 4))
        wide = rng.choice([rng.uniform(0.35, 0.9), rng.uniform(0.9, 1.8)])
        tall = min(wide * rng.uniform(0.6, 1.3), 1.25)
        along = float(rng.uniform(-0.9, 0.9) * (room.half_length(wall) - wide / 2))
        z = rng.uniform(1.0, max(1.05, room.size[2] - tall - 0.25))
        if any(w == wall and abs(along - a) < (wide + b) / 2 + 0.12 for w, a, b in room.hung):
            continue
        frame = box(0, 0, z, wide, 0.04, tall, p.print(), edge=p.wood(), label="picture")
        room.parts += room.moved_to_wall([frame], wall, along, 0.02)
        room.hung.append((wall, along, wide))
        hung += 1
        if hung == count:
            return


def clutter(p: Palette, width: float, depth: float, count: int) -> list[Part]:
    """Small things, `count` of them, on a surface of width x depth metres, at z = 0."""
    rng, parts = p.rng, list[Part]()
    for x in (rng.permutation(np.linspace(-0.5, 0.5, count + 2)[1:-1]) * width).tolist():
        y, kind = float(rng.uniform(-0.25, 0.25) * depth), rng.integers(0, 5)
        if kind == 0:
            parts.append(cylinder(x, y, 0, rng.uniform(0.04, 0.08), rng.uniform(0.1, 0.25), p.paint()))
        elif kind == 1:
            radius = rng.uniform(0.06, 0.12)
            parts.append(sphere(x, y, 0, radius, Paint("marble", p.near(0.5, 0.4, 0.6), p.near(0.5, 0.2, 0.85))))
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
    """A table with things on it and seats around it."""
    rng = p.rng
    w, d, h = rng.uniform(1.1, 1.8), rng.uniform(0.7, 1.0), rng.uniform(0.68, 0.78)
    top, leg = (p.wood() if rng.random() < 0.7 else p.stone()), p.paint()
    if rng.random() < 0.7:
        corners = [(sx * (w / 2 - 0.07), sy * (d / 2 - 0.07)) for sx in (-1, 1) for sy in (-1, 1)]
        legs = [box(x, y, 0, 0.07, 0.07, h - 0.05, leg) for x, y in corners]
    else:
        legs = [cylinder(0, 0, 0.06, 0.09, h - 0.11, leg), cylinder(0, 0, 0, 0.34, 0.06, leg)]
    parts = [box(0, 0, h - 0.05, w, d, 0.05, top), *legs]
    parts += moved(clutter(p, w, d, int(rng.integers(2, 5))), 0, 0, h)
    seat = p.cloth()
    for x in rng.permutation([-0.3, 0.32])[: rng.integers(1, 3)]:
        side = rng.choice([-1, 1])
        parts += moved(labelled(stool(p, seat), "stool"), x * w, side * (d / 2 + 0.22), 0, rng.uniform(-0.3, 0.3))
    return parts


def stool(p: Palette, seat: Paint | None = None) -> list[Part]:
    """A stool, about 0.5 m high."""
    seat = seat or p.cloth()
    if p.rng.random() < 0.5:
        return [cylinder(0, 0, 0, 0.05, 0.42, p.wood()), cylinder(0, 0, 0.42, 0.2, 0.07, seat)]
    return [box(0, 0, 0, 0.3, 0.3, 0.4, p.wood()), box(0, 0, 0.4, 0.38, 0.38, 0.07, seat)]


def shelf(p: Palette) -> list[Part]:
    """A shelf of books and other things."""
    rng = p.rng
    w, d = rng.uniform(0.9, 1.6), rng.uniform(0.28, 0.4)
    rows, pitch = int(rng.integers(3, 6)), rng.uniform(0.34, 0.42)
    h, wood = rows * pitch + 0.03, p.wood()
    back = p.paint() if rng.random() < 0.6 else wood
    parts = [box(sx * (w / 2 - 0.015), 0, 0, 0.03, d, h, wood) for sx in (-1, 1)]
    parts.append(box(0, d / 2 - 0.01, 0, w - 0.06, 0.02, h, back))
    parts += [box(0, -0.01, row * pitch, w - 0.06, d - 0.02, 0.03, wood) for row in range(rows + 1)]
    for row in range(rows):
        z = row * pitch + 0.03
        if rng.random() < 0.3:
            parts += moved(clutter(p, w - 0.2, d * 0.5, 2), 0, 0, z)
            continue
        share, depth, tall = rng.uniform(0.45, 0.95), d * rng.uniform(0.6, 0.8), pitch * rng.uniform(0.6, 0.8)
        long, side = share * (w - 0.08), rng.choice([-1, 1])
        spines = Paint("books", shade(rng, rng.choice([0.02, 0.09, 0.35, 0.6]), 0.5, 0.6), p.near(0, 0.1, 0.85))
        parts.append(box(side * (w - 0.08 - long) / 2, 0, z, long, depth, tall, spines))
    return parts


def cabinet(p: Palette) -> list[Part]:
    """A cabinet with things on it."""
    rng = p.rng
    w, d, h = rng.uniform(0.8, 1.6), rng.uniform(0.4, 0.55), rng.uniform(0.7, 1.1)
    front = (p.paint() if rng.random() < 0.5 else p.wood())._replace(material="door")
    body = [box(0, 0, 0.06, w, d, h - 0.06, front), box(0, 0.02, 0, w - 0.08, d - 0.08, 0.06, p.paint())]
    top = box(0, 0, h, w + 0.04, d + 0.03, 0.03, p.wood())
    return [*body, top] + moved(clutter(p, w, d, int(rng.integers(2, 4))), 0, 0, h + 0.03)


def sofa(p: Palette) -> list[Part]:
    """A sofa with pillows."""
    rng, w, cloth = p.rng, p.rng.uniform(1.4, 2.1), p.cloth()
    parts = [box(0, 0, 0.08, w, 0.8, 0.32, cloth), box(0, 0.32, 0.4, w, 0.2, 0.4, cloth)]
    parts += [box(sx * (w / 2 - 0.09), -0.1, 0.4, 0.18, 0.62, 0.2, cloth) for sx in (-1, 1)]
    for x in np.linspace(-0.32, 0.32, int(rng.integers(2, 4))):
        pillow = p.cloth() if rng.random() < 0.7 else p.print()
        parts.append(box(x * w, 0.12, 0.4, 0.4, 0.14, 0.36, pillow, yaw=rng.normal(0, 0.2)))
    return parts


def crates(p: Palette) -> list[Part]:
    """One or two stacks of crates."""
    rng, parts, side = p.rng, [], p.rng.uniform(0.4, 0.7)
    for x in (-0.55, 0.5)[: rng.integers(1, 3)]:
        z = 0.0
        for level in range(rng.integers(1, 4)):
            s = side * rng.uniform(0.7, 1.0) * (1 - 0.12 * level)
            h = s * rng.uniform(0.6, 1.0)
            paint = [p.wood, p.print, p.paint, p.wood][rng.integers(0, 4)]()
            y, depth = rng.normal(0, 0.03), s * rng.uniform(0.8, 1.1)
            parts.append(box(x * side * 1.2, y, z, s, depth, h, paint, yaw=rng.normal(0, 0.3)))
            z += h
    return parts


def barrels(p: Palette) -> list[Part]:
    """One to three barrels."""
    rng, parts = p.rng, []
    for x, y in ((-0.35, 0.0), (0.33, 0.1), (0.0, -0.5))[: rng.integers(1, 4)]:
        radius, h = rng.uniform(0.2, 0.3), rng.uniform(0.5, 0.9)
        parts += [cylinder(x, y, 0, radius, h, p.paint()), cylinder(x, y, h, radius * 0.9, 0.03, p.paint())]
    return parts


def pedestal(p: Palette) -> list[Part]:
    """A pedestal with an object on it."""
    rng, h = p.rng, p.rng.uniform(0.6, 1.1)
    parts = [box(0, 0, 0, 0.46, 0.46, 0.08, p.stone()), box(0, 0, 0.08, 0.38, 0.38, h - 0.08, p.stone())]
    kind = rng.integers(0, 3)
    if kind == 0:
        radius = rng.uniform(0.16, 0.26)
        parts.append(sphere(0, 0, h, radius, Paint("marble", p.near(0.5, 0.5, 0.55), p.near(0.55, 0.2, 0.85))))
    elif kind == 1:
        parts.append(box(0, 0, h, 0.3, 0.3, 0.3, p.print(), yaw=rng.uniform(0, 1.5)))
    else:
        parts += [cylinder(0, 0, h, 0.12, 0.25, p.paint()), sphere(0, 0, h + 0.22, 0.17, p.paint())]
    return parts


def plant(p: Palette) -> list[Part]:
    """A plant in a pot."""
    rng, h, r = p.rng, p.rng.uniform(0.3, 0.5), p.rng.uniform(0.25, 0.4)
    green = Paint("leaves", shade(rng, 0.28, 0.5, 0.4), shade(rng, 0.22, 0.5, 0.65))
    stem = rng.uniform(0.05, 0.4)
    pot = [cylinder(0, 0, 0, 0.2, h, p.paint()), cylinder(0, 0, h, 0.04, stem, p.wood())]
    return [*pot, sphere(0, 0, h + stem - 0.06, r, green, 1.1)]


def steps(p: Palette) -> list[Part]:
    """Two to four steps with things on the last one."""
    rng, stone = p.rng, p.stone()
    count, w = int(rng.integers(2, 5)), rng.uniform(1.2, 2.0)
    parts = [box(0, 0.28 * k, 0.17 * k, w, 1.5 - 0.56 * k + 0.56 * count, 0.17, stone) for k in range(count)]
    return parts + moved(clutter(p, w, 0.4, 2), 0, 0.28 * count, 0.17 * count)


def pillar(p: Palette, height: float) -> list[Part]:
    """A pillar of `height` metres."""
    shaft, foot = p.stone(), p.stone()
    r = p.rng.uniform(0.14, 0.24)
    base = box(0, 0, 0, 2.6 * r, 2.6 * r, 0.12, foot)
    if p.rng.random() < 0.6:
        return [base, cylinder(0, 0, 0.12, r, height - 0.12, shaft)]
    return [base, box(0, 0, 0.12, 2 * r, 2 * r, height - 0.12, shaft)]


def bench(p: Palette) -> list[Part]:
    """A bench, 0.46 m high."""
    w, wood = p.rng.uniform(1.1, 1.7), p.wood()
    legs = [box(sx * (w / 2 - 0.15), 0, 0, 0.1, 0.34, 0.4, p.stone()) for sx in (-1, 1)]
    return [*legs, box(0, 0, 0.4, w, 0.4, 0.06, wood)]


PIECES: dict[str, Callable[[Palette], list[Part]]] = {
    f.__name__: f for f in (table, stool, shelf, cabinet, sofa, crates, barrels, pedestal, plant, steps, bench)
}

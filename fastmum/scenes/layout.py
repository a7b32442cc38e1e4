"""A scene from a seed: the camera path, the room furnished around it, and the light. World frame as in `room`.

Shapes: V views; eye_V3 and look_V3 float64; T_V44 float64 world to camera, OpenCV axes (x right, y down, z forward).
"""

from typing import NamedTuple

import numpy as np

from fastmum.scenes.furniture import PIECES, add_fixtures, hang_pictures, pillar, wall_paint
from fastmum.scenes.light import Lamp, Lighting
from fastmum.scenes.room import Paint, Palette, Part, Room, as_solids, box, labelled, sphere
from fastmum.scenes.shapes import SHELL, Solids
from fastmum.scenes.textures import shade

FULL = 24  # views of the whole path at its natural step; fewer views cover a part of it, more views take finer steps
# Hues of rooms: earth colours and blues are frequent.
HUES = (0.02, 0.06, 0.09, 0.11, 0.14, 0.3, 0.42, 0.52, 0.57, 0.6, 0.63, 0.95)


class Kind(NamedTuple):
    """The furniture of a kind of scene: pieces in the open and along the walls, their numbers, and pictures."""

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


class Path(NamedTuple):
    """A smooth camera path as a function of s in 0..1, in metres and radians, and the field of view in degrees."""

    kind: str
    centre_2: tuple[float, float]
    start: float
    turn: float
    radius: float
    travel: float
    height: float
    pitch: float
    wobble: tuple[float, ...]
    field_of_view: float

    def eyes(self, s_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Eye positions and unit viewing directions, both [V, 3]."""
        heading = self.start + self.turn * (s_V - 0.5)
        sway, rise = (np.sin(2 * np.pi * (s_V * self.wobble[i] + self.wobble[i + 1])) for i in (0, 2))
        x0, y0 = self.centre_2
        if self.kind == "orbit":  # looks across the centre
            radius = self.radius * (1 + 0.06 * sway)
            x, y = x0 - radius * np.cos(heading), y0 - radius * np.sin(heading)
        else:  # a line at an angle to the view: across it (strafe), along it (walk), or short (turn)
            angle = self.start + {"strafe": np.pi / 2, "walk": 0.35, "turn": np.pi / 2}[self.kind]
            along = self.travel * (s_V - 0.5) * (-1 if self.kind == "strafe" and self.turn > 0 else 1)
            x = x0 - self.radius * np.cos(self.start) + along * np.cos(angle) + 0.06 * sway * np.sin(angle)
            y = y0 - self.radius * np.sin(self.start) + along * np.sin(angle) - 0.06 * sway * np.cos(angle)
        pitch, yaw = self.pitch + 0.05 * sway, heading + 0.04 * rise
        eye = np.stack([x, y, self.height + 0.10 * rise], -1)
        look = np.stack([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)], -1)
        return eye, look

    def poses(self, views: int) -> np.ndarray:
        """World-to-camera matrices [views, 4, 4]."""
        s_V = np.arange(views) / (max(views, FULL) - 1)
        eye, look = self.eyes(s_V)
        roll = 0.035 * np.sin(2 * np.pi * (s_V * self.wobble[2] + self.wobble[1]))
        poses = np.tile(np.eye(4), (views, 1, 1))
        for T_44, eye_3, forward_3, cosine, sine in zip(poses, eye, look, np.cos(roll), np.sin(roll), strict=True):
            right = np.cross(forward_3, [0.0, 0.0, 1.0])
            right /= np.linalg.norm(right)
            down = np.cross(forward_3, right)
            R = np.stack([cosine * right + sine * down, cosine * down - sine * right, forward_3])
            T_44[:3, :3], T_44[:3, 3] = R, -R @ eye_3
        return poses

    def intrinsics(self, size: int) -> np.ndarray:
        """K [3, 3] float64 of a square image."""
        focal = size / 2 / np.tan(np.radians(self.field_of_view) / 2)
        return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])


def draw_path(rng: np.random.Generator, length: float, width: float, height: float) -> Path:
    """A random path in a room of length x width x height metres whose floor is centred on the origin."""
    kind = str(rng.choice(["orbit", "strafe", "walk", "turn"], p=[0.45, 0.25, 0.18, 0.12]))
    room = min(length, width) / 2 - 0.7
    sign, start = float(rng.choice([-1, 1])), float(rng.uniform(0, 2 * np.pi))
    radius, turn, travel = {
        "orbit": (min(room * 0.95, 2.5), (1.5, 2.3), 0.0),
        "strafe": (room * 0.62, (1.3, 1.9), min(3.4, 1.5 * room)),
        "walk": (room * 0.3, (1.15, 1.45), min(2.4, 1.1 * room)),
        "turn": (room * 0.35, (1.6, 2.0), min(1.9, room)),
    }[kind]
    centre = 0.12 * room * float(rng.uniform(-1, 1)), 0.12 * room * float(rng.uniform(-1, 1))
    turned, eye_height = sign * float(rng.uniform(*turn)), float(rng.uniform(1.2, min(1.75, height - 0.8)))
    pitch, wobble = float(rng.uniform(-0.22, -0.05)), rng.uniform((0.8, 0, 0.8, 0), (1.6, 1, 1.6, 1))
    view = float(rng.uniform(58, 72))
    return Path(kind, centre, start, turned, radius, travel, eye_height, pitch, tuple(wobble.tolist()), view)


class Scene(NamedTuple):
    """A scene to render."""

    kind: str
    parts: list[Part]  # one for each solid
    solids: Solids
    lighting: Lighting
    path: Path
    open_top: bool
    reach: float  # metres: upper bound of the distance between a camera and a visible point


def build_scene(seed: int, index: int) -> Scene:
    """Scene `index` of a seed; it does not depend on other scenes."""
    rng = np.random.default_rng([seed, index, 1])
    kind = list(KINDS)[(index + int(rng.integers(0, 2))) % len(KINDS)]
    open_top = kind == "courtyard"
    length, width = (float(x) for x in rng.uniform(4.8, 7.6, 2) + (1.4 if open_top else 0.0))
    height = float(rng.uniform(2.1, 2.8) if open_top else rng.uniform(2.5, 3.5))
    palette = Palette(rng, float(rng.choice(HUES)), float(rng.uniform(0.055, 0.1)), float(rng.uniform(0.5, 0.8)))
    path = draw_path(rng, length, width, height)
    room = Room(palette, np.array([length, width, height]), *path.eyes(np.linspace(0, 1, 49)))
    lamps = add_fixtures(room, kind)
    hang_pictures(room, KINDS[kind].pictures)
    _furnish(room, KINDS[kind])
    shell = Part(
        SHELL, (0.0, 0.0, height / 2), (length / 2, width / 2, height / 2), wall_paint(palette, kind), label="wall"
    )
    parts = [shell, *room.parts]
    if open_top:
        parts += _surroundings(palette, max(length, width) / 2, height)
    solids = as_solids(parts)
    reach = float(np.sqrt((solids.corners_S83() ** 2).sum(-1)).max()) + float(np.hypot(length, width)) / 2 + 2
    return Scene(kind, parts, solids, _lighting(rng, open_top, lamps), path, open_top, reach)


def _furnish(room: Room, kind: Kind) -> None:
    rng, p = room.rng, room.palette
    for _ in range(kind.wall_count):
        name = str(rng.choice(kind.at_wall))
        piece = labelled(PIECES[name](p), name)
        deep = max(q.centre[1] + q.half[1] for q in piece)
        for _ in range(6):
            wall = int(rng.integers(0, 4))
            along = float(rng.uniform(-0.85, 0.85) * room.half_length(wall))
            if room.add(room.moved_to_wall(piece, wall, along, deep + 0.03)):
                break
    if rng.random() < 0.3:
        room.scatter(labelled(pillar(p, room.size[2]), "pillar"), 2.0)
    for _ in range(kind.free_count):
        name = str(rng.choice(kind.free))
        room.scatter(labelled(PIECES[name](p), name), 1.5)
    if kind.rug:
        x, y = rng.uniform(-0.8, 0.8, 2)
        room.parts.append(box(x, y, 0.01, rng.uniform(1.4, 2.6), rng.uniform(1.2, 2.0), 0.008, p.cloth(), label="rug"))


def _surroundings(p: Palette, radius: float, height: float) -> list[Part]:
    rng, parts = p.rng, []
    for i in range(int(rng.integers(3, 6))):
        angle = i * 1.3 + rng.uniform(-0.4, 0.4)
        away = radius + rng.uniform(3.5, 6.0)
        w, h = rng.uniform(2.0, 4.0), height + rng.uniform(1.0, 4.0)
        facade = Paint("facade", p.near(0.05, 0.2, 0.75), p.near(0.5, 0.15, 0.8))
        parts.append(
            box(
                away * np.cos(angle),
                away * np.sin(angle),
                0,
                w,
                2.0,
                h,
                facade,
                yaw=angle + np.pi / 2,
                label="building",
            )
        )
    for _ in range(rng.integers(2, 5)):
        angle, r = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.3)
        away = radius + rng.uniform(1.6, 2.4)
        green = Paint("leaves", shade(rng, 0.28, 0.45, 0.4), shade(rng, 0.22, 0.45, 0.6))
        parts.append(sphere(away * np.cos(angle), away * np.sin(angle), height - 0.4, r, green, 1.2, label="tree"))
    return parts


def _lighting(rng: np.random.Generator, open_top: bool, lamps: list[Lamp]) -> Lighting:
    if not open_top:
        return Lighting(lamps, np.array([0.50, 0.48, 0.46]) * rng.uniform(0.35, 0.75))
    azimuth, up = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1.15)
    direction = np.array([np.cos(azimuth) * np.cos(up), np.sin(azimuth) * np.cos(up), np.sin(up)])
    return Lighting([], np.array([0.30, 0.35, 0.43]), (direction, np.array([1.3, 1.18, 0.98]) * rng.uniform(0.8, 1.1)))

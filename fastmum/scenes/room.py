"""Parts (one solid with one material), the palette of their colours, and a room while it is being furnished.

World frame: metres, z up, the floor at z = 0 with the room's centre above the origin. Parts have x to the right, y to
the back. Nothing is placed within a margin of the camera path, so no camera is ever inside an object.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fastmum.scenes.shapes import BOX, CYLINDER, SPHERE, Solids
from fastmum.scenes.textures import Colour, shade

MARGIN = 0.45  # metres between a camera and any part
AHEAD = 0.95  # the same in front of a camera, where a near part would fill the image


class Paint(NamedTuple):
    """A material with its two main colours."""

    material: str  # a key of `textures.MATERIALS`
    a: Colour
    b: Colour
    options: Mapping[str, Any] = MappingProxyType({})  # further arguments


class Part(NamedTuple):
    """A solid turned by `yaw` about z; `edge` paints sides under 7 cm; `glow` > 0 is a gain in place of light.

    `label` is what it belongs to, one of `labels.CLASSES`.
    """

    kind: int
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    paint: Paint
    yaw: float = 0.0
    edge: Paint | None = None
    glow: float = 0.0
    label: str = ""


class Palette(NamedTuple):
    """The colours of a scene; hues and values are in 0..1."""

    rng: np.random.Generator
    hue: float
    wood_hue: float
    wood_value: float

    def near(self, shift: float, saturation: float, value: float) -> Colour:
        """A shade at `shift` from the scene's hue, as a fraction of the colour circle."""
        return shade(self.rng, self.hue + shift, saturation, value)

    def wood(self) -> Paint:
        """Wood in the scene's tone."""
        value = self.wood_value + self.rng.uniform(-0.1, 0.1)
        light = shade(self.rng, self.wood_hue, 0.45, value, 0.02)
        return Paint("wood", light, shade(self.rng, self.wood_hue + 0.02, 0.55, value * 0.72, 0.02))

    def paint(self) -> Paint:
        """A painted or metal surface in an accent colour."""
        shift, saturation = self.rng.choice([0.0, 0.05, 0.1, 0.5]), self.rng.uniform(0.12, 0.48)
        value = self.rng.uniform(0.4, 0.85)
        kind = str(self.rng.choice(["plaster", "metal", "wood"]))
        return Paint(kind, self.near(shift, saturation, value), self.near(shift + 0.04, saturation, value * 0.75))

    def cloth(self) -> Paint:
        """Cloth in an accent colour."""
        shift = self.rng.choice([0.0, 0.06, 0.5])
        return Paint("fabric", self.near(shift, 0.42, 0.55), self.near(shift + self.rng.normal(0, 0.05), 0.22, 0.8))

    def stone(self) -> Paint:
        """Marble or concrete."""
        value = self.rng.uniform(0.55, 0.85)
        kind = str(self.rng.choice(["marble", "concrete"]))
        return Paint(kind, self.near(0.05, 0.08, value), self.near(0.1, 0.2, value * 0.6))

    def print(self) -> Paint:
        """A photograph or an abstract picture."""
        kind = "picture" if self.rng.random() < 0.75 else "art"
        return Paint(kind, self.near(0.5, 0.4, 0.6), shade(self.rng, self.wood_hue, 0.4, self.rng.choice([0.25, 0.7])))


def box(x: float, y: float, z: float, w: float, d: float, h: float, paint: Paint, **more: Any) -> Part:
    """A box of width, depth and height on (x, y, z)."""
    return Part(BOX, (x, y, z + h / 2), (w / 2, d / 2, h / 2), paint, **more)


def cylinder(x: float, y: float, z: float, radius: float, h: float, paint: Paint, **more: Any) -> Part:
    """An upright cylinder on (x, y, z)."""
    return Part(CYLINDER, (x, y, z + h / 2), (radius, radius, h / 2), paint, **more)


def sphere(x: float, y: float, z: float, radius: float, paint: Paint, squash: float = 1.0, **more: Any) -> Part:
    """A sphere, or a spheroid of height 2 * radius * squash, on (x, y, z)."""
    return Part(SPHERE, (x, y, z + radius * squash), (radius, radius, radius * squash), paint, **more)


def moved(parts: list[Part], x: float, y: float, z: float, yaw: float = 0.0) -> list[Part]:
    """Parts turned by yaw about the origin, then translated."""
    c, s = np.cos(yaw), np.sin(yaw)
    centres = [(x + c * a - s * b, y + s * a + c * b, z + h) for a, b, h in (p.centre for p in parts)]
    return [p._replace(yaw=p.yaw + yaw, centre=centre) for p, centre in zip(parts, centres, strict=True)]


def labelled(parts: list[Part], label: str) -> list[Part]:
    """Parts with a label; those that have one keep it."""
    return [p if p.label else p._replace(label=label) for p in parts]


def as_solids(parts: list[Part]) -> Solids:
    """One solid for each part."""
    cosine, sine = (f([p.yaw for p in parts]).astype(np.float32) for f in (np.cos, np.sin))
    axes = np.zeros((len(parts), 3, 3), np.float32)
    axes[:, 0, 0], axes[:, 0, 1], axes[:, 1, 0], axes[:, 1, 1], axes[:, 2, 2] = cosine, sine, -sine, cosine, 1
    centre, half = (np.array(vectors, np.float32) for vectors in ([p.centre for p in parts], [p.half for p in parts]))
    return Solids(np.array([p.kind for p in parts], np.int8), centre, half, axes)


class Room:
    """A room of `size` (3,) metres around a path of eyes and unit viewing directions [V, 3]."""

    def __init__(self, palette: Palette, size: np.ndarray, eye_V3: np.ndarray, look_V3: np.ndarray) -> None:
        self.palette, self.rng, self.size = palette, palette.rng, size
        self.eye_V3, self.look_V3 = eye_V3, look_V3
        self.parts: list[Part] = []
        self.standing: list[Part] = []  # on the floor
        self.taken: list[tuple[float, float, float]] = []  # free floor in front of doors: x, y, radius
        self.hung: list[tuple[int, float, float]] = []  # doors, windows and pictures: wall, position along it, width

    def clear_of_path(self, parts: list[Part]) -> bool:
        """Whether parts keep their distance from every camera."""
        solids = as_solids(parts)
        near = solids.distance_SN(self.eye_V3.astype(np.float32)) < MARGIN
        ahead = solids.distance_SN((self.eye_V3 + 0.55 * self.look_V3).astype(np.float32)) < AHEAD - MARGIN
        return not (near.any() or ahead.any())

    def add(self, parts: list[Part]) -> bool:
        """Place a piece on the floor if nothing is in its way."""
        solids = as_solids(parts)
        grid = np.linspace(-1, 1, 5, dtype=np.float32)
        square_N3 = np.stack([*np.meshgrid(grid, grid), np.zeros((5, 5), np.float32)], -1).reshape(-1, 3)
        foot_N3 = (solids.centre_S3[:, None] + (square_N3 * solids.half_S3[:, None]) @ solids.axes_S33).reshape(-1, 3)
        if (np.abs(foot_N3[:, :2]) > self.size[:2] / 2 + 0.01).any() or not self.clear_of_path(parts):
            return False
        if any((np.hypot(foot_N3[:, 0] - x, foot_N3[:, 1] - y) < r).any() for x, y, r in self.taken):
            return False
        foot_N3[:, 2] = 0  # compared on the floor plan: standing parts count as endlessly tall
        tall = [p._replace(centre=(*p.centre[:2], 0.0), half=(*p.half[:2], 9.0)) for p in self.standing]
        if tall and (as_solids(tall).distance_SN(foot_N3) < 0.05).any():
            return False
        self.parts += parts
        self.standing += parts
        return True

    def scatter(self, piece: list[Part], nearest: float) -> None:
        """Place a piece at least about `nearest` metres in front of a camera if one of 14 tries finds space."""
        rng = self.rng
        for _ in range(14):
            v = rng.integers(0, len(self.eye_V3))
            place = self.eye_V3[v] + self.look_V3[v] * rng.uniform(nearest, 3.6) + rng.normal(0, 0.4, 3)
            x, y = np.clip(place[:2], -self.size[:2] / 2 + 0.7, self.size[:2] / 2 - 0.7)
            if self.add(moved(piece, x, y, 0, rng.uniform(0, 2 * np.pi))):
                return

    def half_length(self, wall: int) -> float:
        """Half the length of a wall in metres."""
        return float(self.size[wall % 2] / 2)

    def normal(self, wall: int) -> tuple[float, float]:
        """Unit normal (x, y) of a wall, into the room."""
        return float(np.sin(wall * np.pi / 2)), float(-np.cos(wall * np.pi / 2))

    def at_wall(self, wall: int, along: float, out: float) -> tuple[float, float]:
        """The floor point `out` metres in front of a wall, `along` its length from the middle."""
        yaw, (nx, ny), depth = wall * np.pi / 2, self.normal(wall), self.size[1 - wall % 2] / 2 - out
        return float(-nx * depth + np.cos(yaw) * along), float(-ny * depth + np.sin(yaw) * along)

    def moved_to_wall(self, parts: list[Part], wall: int, along: float, out: float, z: float = 0.0) -> list[Part]:
        """Parts with their back to a wall, at `at_wall(wall, along, out)` and height z."""
        return moved(parts, *self.at_wall(wall, along, out), z, wall * np.pi / 2)

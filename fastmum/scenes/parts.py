"""What scenes are built of: parts (one solid, one material each) and the palette their colours come from.

Lengths are metres; x to the right, y to the back, z up.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fastmum.scenes.shapes import BALL, BOX, DRUM, Solids
from fastmum.scenes.textures import Colour, shade


@dataclass(frozen=True)
class Paint:
    """A material of `textures.MATERIALS` with its two colours and further arguments."""

    material: str
    a: Colour
    b: Colour
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One solid, turned by yaw about z; edge paints sides thinner than a hand; glow > 0 is a gain in place of light."""

    kind: int
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    paint: Paint
    yaw: float = 0.0
    edge: Paint | None = None
    glow: float = 0.0


@dataclass(frozen=True)
class Palette:
    """The colours of one scene; every call draws a new shade of the same family."""

    rng: np.random.Generator
    hue: float
    wood_hue: float
    wood_value: float

    def near(self, shift: float, saturation: float, value: float) -> Colour:
        """A shade `shift` away from the scene's hue (a share of the colour circle)."""
        return shade(self.rng, self.hue + shift, saturation, value)

    def wood(self) -> Paint:
        """Boards of the scene's timber."""
        value = self.wood_value + self.rng.uniform(-0.1, 0.1)
        return Paint(
            "wood",
            shade(self.rng, self.wood_hue, 0.45, value, 0.02),
            shade(self.rng, self.wood_hue + 0.02, 0.55, value * 0.72, 0.02),
        )

    def paint(self) -> Paint:
        """A painted or metal surface in an accent colour."""
        shift, saturation = self.rng.choice([0.0, 0.05, 0.1, 0.5]), self.rng.uniform(0.12, 0.48)
        value = self.rng.uniform(0.4, 0.85)
        kind = str(self.rng.choice(["plaster", "metal", "wood"]))
        return Paint(kind, self.near(shift, saturation, value), self.near(shift + 0.04, saturation, value * 0.75))

    def cloth(self) -> Paint:
        """Upholstery, a rug, a blanket."""
        shift = self.rng.choice([0.0, 0.06, 0.5])
        return Paint("fabric", self.near(shift, 0.42, 0.55), self.near(shift + self.rng.normal(0, 0.05), 0.22, 0.8))

    def stone(self) -> Paint:
        """Marble or concrete."""
        value = self.rng.uniform(0.55, 0.85)
        kind = str(self.rng.choice(["marble", "concrete"]))
        return Paint(kind, self.near(0.05, 0.08, value), self.near(0.1, 0.2, value * 0.6))

    def print(self) -> Paint:
        """A picture."""
        kind = "picture" if self.rng.random() < 0.75 else "art"
        return Paint(kind, self.near(0.5, 0.4, 0.6), shade(self.rng, self.wood_hue, 0.4, self.rng.choice([0.25, 0.7])))


def box(x: float, y: float, z: float, w: float, d: float, h: float, paint: Paint, **more: object) -> Part:
    """A box standing at (x, y) on height z: width, depth, height."""
    return Part(BOX, (x, y, z + h / 2), (w / 2, d / 2, h / 2), paint, **more)


def drum(x: float, y: float, z: float, radius: float, h: float, paint: Paint, **more: object) -> Part:
    """An upright cylinder standing at (x, y) on height z."""
    return Part(DRUM, (x, y, z + h / 2), (radius, radius, h / 2), paint, **more)


def ball(x: float, y: float, z: float, radius: float, paint: Paint, squash: float = 1.0, **more: object) -> Part:
    """A ball (or a squashed one) resting on height z."""
    return Part(BALL, (x, y, z + radius * squash), (radius, radius, radius * squash), paint, **more)


def lifted(parts: list[Part], x: float, y: float, z: float, yaw: float = 0.0) -> list[Part]:
    """The parts turned by yaw about the piece's origin, then moved."""
    c, s = np.cos(yaw), np.sin(yaw)
    return [
        replace(
            p,
            yaw=p.yaw + yaw,
            centre=(x + c * p.centre[0] - s * p.centre[1], y + s * p.centre[0] + c * p.centre[1], z + p.centre[2]),
        )
        for p in parts
    ]


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

"""Light on every face: lamps, windows and the sun with soft shadows, and an ambient term with occlusion.

All surfaces are diffuse, so light does not depend on the view: it is computed once per scene on a coarse grid over each
face and multiplied into the textures.

Shapes: N nodes over all faces; x_3N positions in metres, n_3N normals, both float32; light_3N linear, any unit.
"""

from functools import reduce
from typing import NamedTuple

import numpy as np

from fastmum.scenes.shapes import BOX, FAR, SHELL, Solids, fold, intersect, rotate

LIFT = 0.012  # metres between a surface and the origin of its shadow rays


class Lamp(NamedTuple):
    """A box-shaped source at `centre_3`, `half_3` metres; `colour_3` is its light at a distance of one metre."""

    centre_3: np.ndarray
    half_3: np.ndarray
    colour_3: np.ndarray


class Lighting(NamedTuple):
    """The light sources of a scene; colours (3,) are linear RGB."""

    lamps: list[Lamp]
    ambient_3: np.ndarray  # from all directions
    sun: tuple[np.ndarray, np.ndarray] | None = None  # direction towards it, colour


def face_nodes(solids: Solids, s: int, side: int, nu: int, nv: int) -> tuple[np.ndarray, np.ndarray]:
    """World positions and outward normals, [3, nv * nu] each, of an nu x nv grid over one side."""
    v, u = np.meshgrid((np.arange(nv) + 0.5) / nv, (np.arange(nu) + 0.5) / nu, indexing="ij")
    q_N3, g_N3 = fold(int(solids.kind_S[s]), side, u.ravel(), v.ravel())
    axes, half = solids.axes_S33[s], solids.half_S3[s]
    x = rotate(axes.T, list((q_N3 * half).T))
    n = np.stack([np.broadcast_to(row, x[0].shape) for row in rotate(axes.T, list((g_N3 / half).T))])
    x_3N = np.stack([np.broadcast_to(row, x[0].shape) for row in x]) + solids.centre_S3[s][:, None]
    return x_3N.astype(np.float32), (n / np.sqrt((n * n).sum(0))).astype(np.float32)


class Illumination:
    """Light on nodes of a scene. `casters` are the solids that cast shadows: neither the shell nor a lamp's shade."""

    def __init__(
        self, solids: Solids, casters: list[int], x_3N: np.ndarray, n_3N: np.ndarray, rng: np.random.Generator
    ) -> None:
        self.solids, self.casters, self.rng = solids, casters, rng
        self.x_3N, self.n_3N = x_3N + n_3N * np.float32(LIFT), n_3N
        self.shell = int(np.flatnonzero(solids.kind_S == SHELL)[0])

    def compute(self, lighting: Lighting) -> np.ndarray:
        """Light on the nodes, [3, N] float32."""
        sky = 0.82 + 0.18 * self.n_3N[2]  # a little more from above
        light = np.outer(lighting.ambient_3.astype(np.float32), self._ambient() * sky)
        for lamp in lighting.lamps:
            light += np.outer(lamp.colour_3.astype(np.float32), self._from_lamp(lamp))
        if lighting.sun is not None:
            light += np.outer(lighting.sun[1].astype(np.float32), self._from_sun(lighting.sun[0]))
        return light

    def _to_unit(self, s: int, x_3N: np.ndarray) -> list[np.ndarray]:
        return rotate(self.solids.to_unit_S33[s], list(x_3N - self.solids.centre_S3[s][:, None]))

    def _blocked(self, s: int, o_3N: np.ndarray, d_3N: np.ndarray, reach: np.ndarray | float) -> np.ndarray:
        d = rotate(self.solids.to_unit_S33[s], list(d_3N))
        t_in, t_out = intersect(int(self.solids.kind_S[s]), self._to_unit(s, o_3N), d)
        return (np.maximum(t_in, 0) < np.minimum(t_out, reach)) & (t_out > 0)

    def _unshadowed(self, rays: list[np.ndarray], light: list[np.ndarray], reach: float) -> np.ndarray:
        """Mean of light_N over sample rays [3, N] towards one source, without the samples that a solid blocks.

        The rays of a node are nearly parallel, so bounding spheres are tested against their mean ray.
        """
        d = reduce(np.add, rays) / np.float32(len(rays))
        length = np.sqrt((d * d).sum(0))
        spread = np.sqrt(np.max([((ray - d) ** 2).sum(0) for ray in rays], 0)) / length  # tangent of half the cone
        d, lit = d / length, reduce(np.add, light) > 0
        for s in self.casters:
            c = self.solids.centre_S3[s][:, None] - self.x_3N
            along, radius = (c * d).sum(0), self.solids.radius_S[s]
            aside2 = (c * c).sum(0) - along * along
            near = (aside2 < (radius + spread * np.maximum(along + radius, 0)) ** 2) & (along > -radius) & lit
            node = np.flatnonzero(near & (along < reach * length + radius))
            if node.size:
                for ray, value in zip(rays, light, strict=True):
                    value[node] *= ~self._blocked(s, self.x_3N[:, node], ray[:, node], reach)
        return reduce(np.add, light) / np.float32(len(light))

    def _from_lamp(self, lamp: Lamp) -> np.ndarray:
        samples, rays, light = 5, [], []
        for k in range(samples):
            within = self.rng.random(self.x_3N.shape, dtype=np.float32)
            stratum = np.array([[k], [(2 * k) % samples], [(3 * k) % samples]], np.float32) + within
            aim = lamp.centre_3[:, None] + lamp.half_3[:, None] * (2 * (stratum / np.float32(samples)) - 1)
            d = (aim - self.x_3N).astype(np.float32)
            dd = (d * d).sum(0)
            rays.append(d)
            # The constant limits the light next to a lamp.
            light.append(np.maximum((d * self.n_3N).sum(0), 0) / np.sqrt(dd) / (dd + np.float32(0.35)))
        return self._unshadowed(rays, light, 0.97)

    def _from_sun(self, direction_3: np.ndarray) -> np.ndarray:
        rays, light = [], []
        o_unit = self._to_unit(self.shell, self.x_3N)
        outside = np.maximum(np.abs(o_unit[0]), np.abs(o_unit[1])) > 1
        for _ in range(4):
            blur = np.float32(0.02) * self.rng.standard_normal(self.x_3N.shape, dtype=np.float32)
            d = direction_3.astype(np.float32)[:, None] + blur
            d_unit = rotate(self.solids.to_unit_S33[self.shell], list(d))
            _, t_walls = intersect(BOX, [*o_unit[:2], np.float32(0)], [*d_unit[:2], np.float32(0)])
            over_wall = o_unit[2] + t_walls * d_unit[2] > 1  # it passes above the walls
            rays.append(d)
            light.append(np.maximum((d * self.n_3N).sum(0), 0) * (over_wall | outside))
        return self._unshadowed(rays, light, float(FAR))

    def _ambient(self) -> np.ndarray:
        """Visible share of the surroundings within about a metre; at least 0.25, for indirect light."""
        n_3N = self.n_3N
        helper = np.where(np.abs(n_3N[2]) < 0.9, np.array([[0.0], [0.0], [1.0]]), np.array([[1.0], [0.0], [0.0]]))
        tangent = np.cross(n_3N, helper, axis=0)
        tangent = (tangent / np.sqrt((tangent * tangent).sum(0))).astype(np.float32)
        other = np.cross(n_3N, tangent, axis=0)
        directions, radius, centre = 10, self.solids.radius_S, self.solids.centre_S3
        spin: np.ndarray = self.rng.random(n_3N.shape[1:], dtype=np.float32)
        free = np.zeros_like(spin)
        gap = {s: np.sqrt(((self.x_3N - centre[s][:, None]) ** 2).sum(0)) - radius[s] for s in self.casters}
        o_unit = self._to_unit(self.shell, self.x_3N)
        for k in range(directions):
            rise = np.float32(np.sqrt(1 - (k + 0.5) / directions))
            angle = (spin + np.float32(k * 0.618034)) * np.float32(2 * np.pi)
            flat = np.sqrt(1 - rise * rise)
            d = n_3N * rise + (tangent * np.cos(angle) + other * np.sin(angle)) * flat
            reach = 0.25 + 1.25 * ((k * 0.381966) % 1.0)
            blocked: np.ndarray = np.zeros(spin.shape, bool)
            for s in self.casters:
                near = np.flatnonzero((gap[s] < reach) & ~blocked)
                if near.size:
                    blocked[near] = self._blocked(s, self.x_3N[:, near], d[:, near], reach)
            _, t_wall = intersect(BOX, o_unit, rotate(self.solids.to_unit_S33[self.shell], list(d)))
            free += np.where(blocked, 0.0, np.where(t_wall < reach, 0.55, 1.0)).astype(np.float32)  # walls reflect
        return 0.25 + 0.75 * free / directions

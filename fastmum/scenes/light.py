"""Light that falls on every face: lamps, windows and the sun with soft shadows, and an ambient term with occlusion.

Nothing shines, so light does not depend on the view: it is computed once a scene on a coarse grid over each face and
multiplied into the textures.

Shapes: N nodes over all faces; x_3N positions in metres, n_3N normals, both float32; light_3N linear, any unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmum.scenes.shapes import BOX, FAR, SHELL, Solids, enter_leave, fold

LIFT = 0.012  # metres a shadow ray starts off its surface


@dataclass(frozen=True)
class Lamp:
    """A box-shaped source at `centre_3`, `half_3` metres; `colour_3` is its light one metre away."""

    centre_3: np.ndarray
    half_3: np.ndarray
    colour_3: np.ndarray


@dataclass(frozen=True)
class Lighting:
    """All light of a scene; sun_3 points at the sun (or is None), ambient_3 comes from everywhere."""

    lamps: tuple[Lamp, ...]
    ambient_3: np.ndarray
    sun_3: np.ndarray | None = None
    sun_colour_3: np.ndarray | None = None


def turn(matrix_33: np.ndarray, x: list) -> list:
    """matrix @ x for three planes of coordinates; zeros of the matrix (most solids only turn about z) cost nothing."""
    rows = []
    for i in range(3):
        terms = [x[j] if matrix_33[i, j] == 1 else x[j] * matrix_33[i, j] for j in range(3) if matrix_33[i, j] != 0]
        row = terms[0]
        for term in terms[1:]:
            row = row + term
        rows.append(row)
    return rows


def face_nodes(solids: Solids, s: int, side: int, nu: int, nv: int) -> tuple[np.ndarray, np.ndarray]:
    """World points and outward normals (each [3, nv * nu]) on the centres of an nu x nv grid over one side."""
    v, u = np.meshgrid((np.arange(nv) + 0.5) / nv, (np.arange(nu) + 0.5) / nu, indexing="ij")
    q_N3, g_N3 = fold(int(solids.kind_S[s]), side, u.ravel(), v.ravel())
    axes, half = solids.axes_S33[s], solids.half_S3[s]
    x = turn(axes.T, list((q_N3 * half).T))
    n = np.stack([np.broadcast_to(row, x[0].shape) for row in turn(axes.T, list((g_N3 / half).T))])
    x_3N = np.stack([np.broadcast_to(row, x[0].shape) for row in x]) + solids.centre_S3[s][:, None]
    return x_3N.astype(np.float32), (n / np.sqrt((n * n).sum(0))).astype(np.float32)


def illuminate(
    solids: Solids,
    casts_S: np.ndarray,
    lighting: Lighting,
    x_3N: np.ndarray,
    n_3N: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Light on every node, [3, N]; casts_S says which solids throw shadows (a lamp's own shade does not)."""
    x = x_3N + n_3N * np.float32(LIFT)
    bright = _ambient(solids, casts_S, x, n_3N, rng)
    sky = 0.82 + 0.18 * n_3N[2]  # a little more from above
    light = lighting.ambient_3.astype(np.float32)[:, None] * (bright * sky)[None]
    for lamp in lighting.lamps:
        light += lamp.colour_3.astype(np.float32)[:, None] * _from_lamp(solids, casts_S, lamp, x, n_3N, rng)[None]
    if lighting.sun_3 is not None:
        light += lighting.sun_colour_3.astype(np.float32)[:, None] * _from_sun(solids, casts_S, lighting, x, n_3N, rng)
    return light


def _blocked(solids: Solids, s: int, o_3N: np.ndarray, d_3N: np.ndarray, reach: np.ndarray | float) -> np.ndarray:
    """Whether rays o + t d meet solid s for t in 0..reach."""
    to_unit = solids.to_unit_S33[s]
    o = turn(to_unit, list(o_3N - solids.centre_S3[s][:, None]))
    t_in, t_out = enter_leave(int(solids.kind_S[s]), o, turn(to_unit, list(d_3N)))
    return (np.maximum(t_in, 0) < np.minimum(t_out, reach)) & (t_out > 0)


def _unshadowed(
    solids: Solids, casts_S: np.ndarray, x_3N: np.ndarray, rays: list[np.ndarray], light: list[np.ndarray], reach: float
) -> np.ndarray:
    """Mean of light_N over sample rays [3, N] towards one source, each counted where no solid is in its way.

    The rays of a node are nearly parallel: whether a solid's bounding sphere is near them is asked once, of their mean.
    """
    d = sum(rays) / np.float32(len(rays))
    length = np.sqrt((d * d).sum(0))
    spread = np.sqrt(np.max([((ray - d) ** 2).sum(0) for ray in rays], 0)) / length  # tangent of half the cone's angle
    d, lit = d / length, sum(light) > 0
    for s in np.flatnonzero(casts_S):
        c = solids.centre_S3[s][:, None] - x_3N
        along, radius = (c * d).sum(0), solids.radius_S[s]
        aside2 = (c * c).sum(0) - along * along
        near = (aside2 < (radius + spread * np.maximum(along + radius, 0)) ** 2) & (along > -radius) & lit
        node = np.flatnonzero(near & (along < reach * length + radius))
        if node.size:
            for ray, value in zip(rays, light, strict=True):
                value[node] *= ~_blocked(solids, s, x_3N[:, node], ray[:, node], reach)
    return sum(light) / np.float32(len(light))


def _from_lamp(
    solids: Solids, casts_S: np.ndarray, lamp: Lamp, x_3N: np.ndarray, n_3N: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    samples, rays, light = 5, [], []
    for k in range(samples):
        within = rng.random((3, x_3N.shape[1]), dtype=np.float32)
        stratum = (np.array([[k], [(2 * k) % samples], [(3 * k) % samples]], np.float32) + within) / np.float32(samples)
        aim = lamp.centre_3[:, None] + lamp.half_3[:, None] * (2 * stratum - 1)
        d = (aim - x_3N).astype(np.float32)
        dd = (d * d).sum(0)
        rays.append(d)
        light.append(np.maximum((d * n_3N).sum(0), 0) / np.sqrt(dd) / (dd + np.float32(0.35)))  # never a white-hot spot
    return _unshadowed(solids, casts_S, x_3N, rays, light, 0.97)


def _from_sun(
    solids: Solids,
    casts_S: np.ndarray,
    lighting: Lighting,
    x_3N: np.ndarray,
    n_3N: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    rays, light = [], []
    shell = np.flatnonzero(solids.kind_S == SHELL)[0]
    to_unit = solids.to_unit_S33[shell]
    o_unit = turn(to_unit, list(x_3N - solids.centre_S3[shell][:, None]))
    outside = np.maximum(np.abs(o_unit[0]), np.abs(o_unit[1])) > 1
    for _ in range(4):
        blur = np.float32(0.02) * rng.standard_normal((3, x_3N.shape[1]), dtype=np.float32)
        d = lighting.sun_3.astype(np.float32)[:, None] + blur
        d_unit = turn(to_unit, list(d))
        _, t_walls = enter_leave(BOX, [*o_unit[:2], np.float32(0)], [*d_unit[:2], np.float32(0)])
        over_wall = o_unit[2] + t_walls * d_unit[2] > 1  # it clears the walls where it crosses them
        rays.append(d)
        light.append(np.maximum((d * n_3N).sum(0), 0) * (over_wall | outside))
    return _unshadowed(solids, casts_S, x_3N, rays, light, float(FAR))


def _ambient(
    solids: Solids, casts_S: np.ndarray, x_3N: np.ndarray, n_3N: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Share of the surroundings a node sees within about a metre; 0.25 is left to light that bounces."""
    helper = np.where(np.abs(n_3N[2]) < 0.9, np.array([[0.0], [0.0], [1.0]]), np.array([[1.0], [0.0], [0.0]]))
    tangent = np.cross(n_3N, helper, axis=0)
    tangent = (tangent / np.sqrt((tangent * tangent).sum(0))).astype(np.float32)
    other = np.cross(n_3N, tangent, axis=0)
    directions, radius = 10, solids.radius_S
    spin = rng.random(x_3N.shape[1], dtype=np.float32)
    free = np.zeros_like(spin)
    gap = [np.sqrt(((x_3N - solids.centre_S3[s][:, None]) ** 2).sum(0)) - radius[s] for s in range(len(solids))]
    shell = int(np.flatnonzero(solids.kind_S == SHELL)[0])
    for k in range(directions):
        rise = np.float32(np.sqrt(1 - (k + 0.5) / directions))
        angle = (spin + np.float32(k * 0.618034)) * np.float32(2 * np.pi)
        flat = np.sqrt(1 - rise * rise)
        d = n_3N * rise + (tangent * np.cos(angle) + other * np.sin(angle)) * flat
        reach = 0.25 + 1.25 * ((k * 0.381966) % 1.0)
        blocked = np.zeros(spin.size, bool)
        for s in np.flatnonzero(casts_S):
            near = np.flatnonzero((gap[s] < reach) & ~blocked)
            if near.size:
                blocked[near] = _blocked(solids, s, x_3N[:, near], d[:, near], reach)
        to_unit = solids.to_unit_S33[shell]
        o_unit = turn(to_unit, list(x_3N - solids.centre_S3[shell][:, None]))
        _, t_wall = enter_leave(BOX, o_unit, turn(to_unit, list(d)))
        free += np.where(blocked, 0.0, np.where(t_wall < reach, 0.55, 1.0)).astype(np.float32)  # pale walls bounce
    return 0.25 + 0.75 * free / directions

"""Ray casting: the first hit of each pixel's ray, its depth and its colour.

The colour is one filtered sample per pixel from the lit texture atlas; only pixels on an outline get more rays. Rays
have depth 1 along the optical axis, so their parameter t is the z-depth.

Shapes: [H, W] the pixel grid, N rays, S solids; K_33 intrinsics, T_44 world to camera, both float64.
"""

from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from fastmum.scenes.atlas import Atlas
from fastmum.scenes.shapes import BOX, CYLINDER, FAR, SHELL, SPHERE, Solids, intersect, rotate, unfold
from fastmum.scenes.textures import FIELD, field

SUBPIXELS = np.array([[-0.125, -0.375], [0.375, -0.125], [0.125, 0.375], [-0.375, 0.125]])  # a rotated grid


class SceneView(NamedTuple):
    """A camera in a scene; width and height in pixels."""

    solids: Solids
    open_top: bool
    K_33: np.ndarray
    T_44: np.ndarray
    width: int
    height: int

    @property
    def eye_3(self) -> np.ndarray:
        """Position of the camera in the world, metres."""
        return -self.T_44[:3, :3].T @ self.T_44[:3, 3]

    def directions(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """World directions [3, ...] float32 of depth 1 through pixel coordinates (first centre at 0.5, 0.5)."""
        across = (x - self.K_33[0, 2]) / self.K_33[0, 0]
        below = (y - self.K_33[1, 2]) / self.K_33[1, 1]
        R = self.T_44[:3, :3]
        return np.stack([R[0, i] * across + R[1, i] * below + R[2, i] for i in range(3)]).astype(np.float32)


def render(view: SceneView, atlas: Atlas) -> tuple[np.ndarray, np.ndarray]:
    """Image [H, W, 3] uint8, and z-depth [H, W] float32 of the pixel centres (0 for the sky)."""
    shape = (view.height, view.width)
    xy_2N = np.stack(np.meshgrid(np.arange(view.width) + 0.5, np.arange(view.height) + 0.5)).reshape(2, -1)
    d_3N = view.directions(*xy_2N)
    depth_HW, solid_HW = trace(view, d_3N.reshape(3, *shape))
    colour_N3, face_N = _colours(view, atlas, d_3N, depth_HW.ravel(), solid_HW.ravel())
    face_HW, padded = face_N.reshape(shape), np.pad(face_N.reshape(shape), 1, mode="edge")
    neighbours = padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]
    outline = np.flatnonzero(reduce(np.logical_or, (face_HW != other for other in neighbours)))
    x, y = (xy_2N[:, None, outline] + SUBPIXELS.T[:, :, None]).reshape(2, -1)
    d = view.directions(x, y)
    more, _ = _colours(view, atlas, d, *trace(view, d, (x, y)))
    colour_N3[outline] += more.reshape(len(SUBPIXELS), -1, 3).sum(0)
    colour_N3[outline] /= 1 + len(SUBPIXELS)
    image = (colour_N3 + np.float32(0.5)).astype(np.uint8).reshape(*shape, 3)
    return image, np.where(solid_HW < 0, np.float32(0), depth_HW)


def trace(view: SceneView, d: np.ndarray, at: tuple[np.ndarray, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """First hits of rays from the camera: z-depth float32 and solid int64 (-1: sky).

    `d` are the directions [3, H, W] of the pixel grid, or [3, N] of rays `at` pixel coordinates (x_N, y_N).
    """
    eye, solids = view.eye_3, view.solids
    depth, solid = np.full(d.shape[1:], FAR, np.float32), np.full(d.shape[1:], -1, np.int64)
    to_unit = solids.to_unit_S33
    for s, (x0, x1, y0, y1) in _windows(view):
        part: Any = slice(y0, y1), slice(x0, x1)
        if at is not None:
            part = (np.flatnonzero((at[0] >= x0) & (at[0] <= x1) & (at[1] >= y0) & (at[1] <= y1)),)
        inside = d[:, *part]
        if inside.size == 0:
            continue
        o_unit = (to_unit[s].astype(np.float64) @ (eye - solids.centre_S3[s])).astype(np.float32)
        d_unit = rotate(to_unit[s], list(inside))
        kind = int(solids.kind_S[s])
        t_in, t_out = intersect(kind, list(o_unit), d_unit)
        best = depth[part]
        if kind == SHELL:
            t_in = t_out
            if view.open_top:
                _, t_walls = intersect(BOX, [*o_unit[:2], np.float32(0)], [*d_unit[:2], np.zeros_like(t_out)])
                t_in = np.where(o_unit[2] + d_unit[2] * np.minimum(t_walls, FAR) > 1, FAR, t_out)
            closer = t_in < best
        else:
            closer = (t_in < best) & (t_in <= t_out) & (t_in > 0)
        depth[part], solid[part] = np.where(closer, t_in, best), np.where(closer, s, solid[part])
    return depth, solid


def _windows(view: SceneView) -> list[tuple[int, list[int]]]:
    """Solids that may be visible, each with its pixel window (x0, x1, y0, y1)."""
    corners = view.solids.corners_S83().astype(np.float64) @ view.T_44[:3, :3].T + view.T_44[:3, 3]
    z = corners[:, :, 2]
    xy = np.diag(view.K_33)[:2] * corners[:, :, :2] / np.maximum(z, 1e-3)[:, :, None] + view.K_33[:2, 2]
    size = view.width, view.height
    low, high = (np.clip(edge, 0, size).astype(int) for edge in (xy.min(1) - 2, xy.max(1) + 3))
    nearest, farthest = z.min(1), z.max(1)
    whole = (view.solids.kind_S == SHELL) | ((nearest < 0.05) & (farthest > 0.05))
    boxed = (nearest >= 0.05) & (low < high).all(1)
    windows = np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)
    windows[whole] = 0, view.width, 0, view.height
    return [(s, windows[s].tolist()) for s in np.flatnonzero(whole | boxed).tolist()]


def _colours(
    view: SceneView, atlas: Atlas, d_3N: np.ndarray, depth_N: np.ndarray, solid_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Colours [N, 3] float32 in 0..255 and face numbers [N] (-1: sky) of traced rays."""
    colour, face = np.empty((depth_N.size, 3), np.float32), np.full(depth_N.size, -1, np.int64)
    solids, sky, seen = view.solids, np.flatnonzero(solid_N < 0), np.flatnonzero(solid_N >= 0)
    if sky.size:
        colour[sky] = _sky(d_3N[:, sky], 997 * solids.half_S3[0])
    d_3N, depth_N, solid_N = d_3N[:, seen], depth_N[seen], solid_N[seen]
    to_unit = solids.to_unit_S33
    o_S3 = np.einsum("sij,sj->si", to_unit, (view.eye_3 - solids.centre_S3).astype(np.float32))
    dq_3N = np.stack([reduce(np.add, (to_unit[:, i, j][solid_N] * d_3N[j] for j in range(3))) for i in range(3)])
    q_3N = np.stack([o_S3[:, i][solid_N] + depth_N * dq_3N[i] for i in range(3)])
    kind = solids.kind_S[solid_N]
    side, u, v = unfold(kind, q_3N)
    face_N = face[seen] = 6 * solid_N + side

    # A pixel's footprint on a tilted face is long along the ray's projection on it: two samples cover it.
    footprint = depth_N * np.float32(1 / view.K_33[0, 0])
    length2 = (d_3N * d_3N).sum(0)
    axis = side >> 1
    along = np.choose(axis, dq_3N) * solids.half_S3[solid_N, axis]
    slope = np.sqrt(length2) / np.maximum(np.abs(along), np.float32(0.02))
    slope[(kind == SPHERE) | ((kind == CYLINDER) & (side == 0))] = 1.2
    one, two = np.flatnonzero(slope < np.float32(1.4)), np.flatnonzero(slope >= np.float32(1.4))
    colour[seen[one]] = atlas.sample(face_N[one], u[one], v[one], footprint[one] * np.float32(0.9))
    reach, (x, y, z) = footprint[two] * slope[two], dq_3N[:, two]
    tangent = np.sqrt(np.maximum(length2[two] - along[two] ** 2, np.float32(1e-6)))
    quarter = np.float32(0.25) * reach / tangent
    across = np.choose(side[two], [y, -y, -x, x, x, x]) * np.float32(0.5)  # in units of u and v
    du = quarter * np.where(kind[two] == SHELL, -across, across)
    dv = quarter * (np.choose(side[two], [-z, -z, -z, -z, -y, y]) * np.float32(0.5))
    width = np.maximum(footprint[two] * np.float32(0.9), reach * np.float32(0.4))
    before = atlas.sample(face_N[two], u[two] - du, v[two] - dv, width)
    colour[seen[two]] = (before + atlas.sample(face_N[two], u[two] + du, v[two] + dv, width)) * np.float32(0.5)
    return colour, face


def _sky(d_3N: np.ndarray, offset_2: np.ndarray) -> np.ndarray:
    """Colours [N, 3] in 0..255 of a pale horizon, a blue zenith and clouds; offset_2 shifts the clouds, in texels."""
    length = np.sqrt((d_3N * d_3N).sum(0))
    up = np.maximum(d_3N[2] / length, 0)
    scale = np.float32(150) / ((up + np.float32(0.25)) * length)
    x, y = d_3N[0] * scale + offset_2[0], d_3N[1] * scale + offset_2[1]
    x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = (x - x0).astype(np.float32), (y - y0).astype(np.float32)
    clouds, right, below = field("cloud"), (x0 + 1) & (FIELD - 1), (y0 + 1) & (FIELD - 1)
    x0, y0 = x0 & (FIELD - 1), y0 & (FIELD - 1)
    top = clouds[y0, x0] * (1 - fx) + clouds[y0, right] * fx
    cloud = top * (1 - fy) + (clouds[below, x0] * (1 - fx) + clouds[below, right] * fx) * fy
    white = (np.tanh(cloud * np.float32(1.1)) * np.float32(0.45) + np.float32(0.48))[:, None]
    height = np.sqrt(up)[:, None]
    blue = np.array([[196, 210, 224]], np.float32) * (1 - height) + np.array([[92, 136, 196]], np.float32) * height
    return blue + (np.array([[228, 228, 230]], np.float32) - blue) * white

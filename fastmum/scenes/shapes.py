"""Solids of a scene as arrays, ray intersection, and texture coordinates on their surfaces.

A solid is a unit shape in its own frame, q = diag(1 / half) @ axes @ (x - centre): box |q_i| <= 1, sphere |q| <= 1,
cylinder q_x^2 + q_y^2 <= 1 and |q_z| <= 1. A ray keeps its parameter t in that frame.

Shapes: S solids, N rays; o_3 or o_3N origins, d_3N directions, t_N float32; faces are numbered solid * 6 + side.
Sides of a box: +x -x +y -y +z -z. Cylinder: 0 mantle, 4 top, 5 bottom. Sphere: 0 and 1, the halves towards +x and -x.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

BOX, SPHERE, CYLINDER, SHELL = 0, 1, 2, 3  # a shell is a box seen from inside: the room
SIDES = {BOX: range(6), SPHERE: (0, 1), CYLINDER: (0, 4, 5), SHELL: range(6)}
FAR = np.float32(1e9)

# Directions of a texture's u (right) and v (down) on each side of a box seen from outside.
_NORMALS = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], np.float32)
_RIGHT = np.array([[0, 1, 0], [0, -1, 0], [-1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]], np.float32)
_DOWN = np.array([[0, 0, -1], [0, 0, -1], [0, 0, -1], [0, 0, -1], [0, -1, 0], [0, 1, 0]], np.float32)


@dataclass(frozen=True)
class Solids:
    """S solids: kind_S int8, centre_S3 and half_S3 float32 metres, axes_S33 float32 (rows: own axes in the world)."""

    kind_S: np.ndarray
    centre_S3: np.ndarray
    half_S3: np.ndarray
    axes_S33: np.ndarray

    def __len__(self) -> int:
        return len(self.kind_S)

    @property
    def to_unit_S33(self) -> np.ndarray:
        """Maps a world offset from the centre to unit coordinates."""
        return self.axes_S33 / self.half_S3[:, :, None]

    @property
    def radius_S(self) -> np.ndarray:
        """Radii of the bounding spheres, metres."""
        return np.sqrt((self.half_S3**2).sum(1))

    def corners_S83(self) -> np.ndarray:
        """Corners of the bounding boxes in the world, metres."""
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)
        return self.centre_S3[:, None] + np.einsum("ki,sij->skj", signs, self.axes_S33 * self.half_S3[:, :, None])

    def distance_SN(self, x_N3: np.ndarray) -> np.ndarray:
        """Distance of points from each bounding box (shell: from its inner walls); negative inside."""
        local_SN3 = np.abs(np.einsum("sij,snj->sni", self.axes_S33, x_N3[None] - self.centre_S3[:, None]))
        over_SN3 = local_SN3 - self.half_S3[:, None]
        inside = np.minimum(over_SN3.max(-1), 0.0)
        distance = np.sqrt((np.maximum(over_SN3, 0.0) ** 2).sum(-1)) + inside
        return np.where((self.kind_S == SHELL)[:, None], -distance, distance)


def rotate(matrix_33: np.ndarray, x: list[Any]) -> list[Any]:
    """matrix @ x for three coordinate arrays. Zeros in the matrix cost nothing; most solids only turn about z."""
    rows = []
    for i in range(3):
        terms = [x[j] if matrix_33[i, j] == 1 else x[j] * matrix_33[i, j] for j in range(3) if matrix_33[i, j] != 0]
        rows.append(reduce(np.add, terms))
    return rows


def intersect(kind: int, o: list[Any], d: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave a unit solid: (t_in_N, t_out_N); t_in > t_out is a miss.

    o and d are the unit coordinates of origin and direction: three scalars or arrays [N].
    """
    if kind in (BOX, SHELL):
        return _slabs(o, d)
    if kind == SPHERE:
        return _quadric(o, d)
    round_in, round_out = _quadric(o[:2], d[:2])
    flat_in, flat_out = _slabs(o[2:], d[2:])
    return np.maximum(round_in, flat_in), np.minimum(round_out, flat_out)


def _slabs(o: list[Any], d: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    near, far = [], []
    for o_i, d_i in zip(o, d, strict=True):
        inverse = np.float32(1.0) / (d_i + np.float32(1e-20))  # only changes zero
        middle, reach = -o_i * inverse, np.abs(inverse)
        near.append(middle - reach)
        far.append(middle + reach)
    return reduce(np.maximum, near), reduce(np.minimum, far)


def _quadric(o: list[Any], d: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    a = sum(d_i * d_i for d_i in d) + np.float32(1e-20)
    b = sum(o_i * d_i for o_i, d_i in zip(o, d, strict=True))
    c = sum(o_i * o_i for o_i in o) - np.float32(1.0)
    root2 = b * b - a * c
    root = np.sqrt(np.maximum(root2, 0.0))
    miss = root2 < 0
    return np.where(miss, FAR, (-b - root) / a), np.where(miss, -FAR, (-b + root) / a)


def unfold(kind_N: np.ndarray, q_3N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Side and texture coordinates (u_N, v_N) in 0..1 of surface points in unit coordinates."""
    magnitude = np.abs(q_3N)
    axis = np.where(magnitude[0] >= magnitude[1], 0, 1)
    axis = np.where(magnitude[2] > np.maximum(magnitude[0], magnitude[1]), 2, axis)
    side = 2 * axis + (np.take_along_axis(q_3N, axis[None], 0)[0] < 0)
    u, v = (reduce(np.add, (table[side, i] * q_3N[i] for i in range(3))) for table in (_RIGHT, _DOWN))
    np.negative(u, where=kind_N == SHELL, out=u)  # from inside, right and left are exchanged
    sphere = np.flatnonzero(kind_N == SPHERE)
    if sphere.size:
        x, y, z = q_3N[:, sphere]
        scale = 1.0 / np.sqrt(1.0 + np.abs(x))  # Lambert's equal-area projection of a half onto a disc
        side[sphere], u[sphere], v[sphere] = x < 0, y * scale, -z * scale
    cylinder = np.flatnonzero(kind_N == CYLINDER)
    if cylinder.size:
        x, y, z = q_3N[:, cylinder]
        mantle = z * z < x * x + y * y
        side[cylinder] = np.where(mantle, 0, np.where(z > 0, 4, 5))
        u[cylinder] = np.where(mantle, np.arctan2(y, x) * np.float32(1.0 / np.pi), x)
        v[cylinder] = np.where(mantle, -z, np.where(z > 0, -y, y))
    return side, u * np.float32(0.5) + np.float32(0.5), v * np.float32(0.5) + np.float32(0.5)


def fold(kind: int, side: int, u_N: np.ndarray, v_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `unfold` for one side: points q_N3 and outward gradients n_N3 in unit coordinates."""
    a, b = 2 * u_N - 1, 2 * v_N - 1
    if kind == SPHERE:
        rho2 = np.minimum(a * a + b * b, 1.0)
        stretch = np.sqrt(2.0 - rho2)
        q = np.stack([(1 - rho2) * (1 - 2 * side), a * stretch, -b * stretch], -1)
        q /= np.sqrt((q * q).sum(-1, keepdims=True))
        return q.astype(np.float32), q.astype(np.float32)
    if kind == CYLINDER and side == 0:
        n = np.stack([np.cos(a * np.pi), np.sin(a * np.pi), np.zeros_like(a)], -1)
        return (n - np.stack([0 * b, 0 * b, b], -1)).astype(np.float32), n.astype(np.float32)
    if kind == CYLINDER:
        shrink = 1.0 / np.maximum(1.0, np.sqrt(a * a + b * b))  # texels outside the disc are not visible
        a, b = a * shrink, b * shrink
    sign = -1.0 if kind == SHELL else 1.0
    n = np.broadcast_to(_NORMALS[side] * sign, (a.size, 3))
    q = _NORMALS[side] + a[:, None] * (_RIGHT[side] * sign) + b[:, None] * _DOWN[side]
    return q.astype(np.float32), n.astype(np.float32)


def side_size(kind: int, side: int, half_3: np.ndarray) -> tuple[float, float]:
    """Width and height in metres of the texture of a side."""
    x, y, z = (float(2 * h) for h in half_3)
    if kind == SPHERE:
        return (float(np.sqrt(2.0)) * (x + y + z) / 3,) * 2
    if kind == CYLINDER and side == 0:
        return float(np.pi) * (x + y) / 2, z
    return ((y, z), (x, z), (x, y))[side // 2]

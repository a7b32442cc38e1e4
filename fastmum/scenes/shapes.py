"""Solids of a scene as arrays, where a ray meets them, and how their faces unfold to textures.

A solid is a unit shape in its own frame, q = diag(1 / half) @ axes @ (x - centre): box |q| <= 1 on each axis, ball
|q| <= 1, drum qx^2 + qy^2 <= 1 and |qz| <= 1. A ray keeps its parameter t through that map.

Shapes: S solids, N rays; o_3 or o_3N origins, d_3N directions, t_N float32; faces are numbered solid * 6 + side.
Sides of a box: +x -x +y -y +z -z. A drum: 0 mantle, 4 top, 5 bottom. A ball: 0 and 1, the halves towards +x and -x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BOX, BALL, DRUM, SHELL = 0, 1, 2, 3  # a shell is a box seen from the inside: the room
FAR = np.float32(1e9)

# Where a texture's right (u) and down (v) point, for each side of a box seen from outside.
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
        """World offset from the centre to unit coordinates."""
        return self.axes_S33 / self.half_S3[:, :, None]

    @property
    def radius_S(self) -> np.ndarray:
        """Radius of a sphere about the centre that holds the solid, metres."""
        return np.sqrt((self.half_S3**2).sum(1))

    def corners_S83(self) -> np.ndarray:
        """Corners of the box that holds each solid, in the world."""
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)
        return self.centre_S3[:, None] + np.einsum("ki,sij->skj", signs, self.axes_S33 * self.half_S3[:, :, None])

    def distance_SN(self, x_N3: np.ndarray) -> np.ndarray:
        """Distance of points from each solid's bounding box (a shell: to its inner walls); negative is inside it."""
        local_SN3 = np.abs(np.einsum("sij,snj->sni", self.axes_S33, x_N3[None] - self.centre_S3[:, None]))
        over_SN3 = local_SN3 - self.half_S3[:, None]
        inside = np.minimum(over_SN3.max(-1), 0.0)
        distance = np.sqrt((np.maximum(over_SN3, 0.0) ** 2).sum(-1)) + inside
        return np.where((self.kind_S == SHELL)[:, None], -distance, distance)


def enter_leave(kind: int, o: list, d: list) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave one unit solid: (t_in_N, t_out_N), with t_in > t_out for a miss.

    o and d are the three unit coordinates of origin and direction, each a scalar or [N].
    """
    if kind in (BOX, SHELL):
        return _slabs(o, d)
    if kind == BALL:
        return _quadric(o, d)
    round_in, round_out = _quadric(o[:2], d[:2])
    flat_in, flat_out = _slabs(o[2:], d[2:])
    return np.maximum(round_in, flat_in), np.minimum(round_out, flat_out)


def _slabs(o: list, d: list) -> tuple[np.ndarray, np.ndarray]:
    t_in, t_out = None, None
    for o_i, d_i in zip(o, d, strict=True):
        inverse = np.float32(1.0) / (d_i + np.float32(1e-20))  # too small to change any number but zero
        middle, reach = -o_i * inverse, np.abs(inverse)
        near, far = middle - reach, middle + reach
        t_in = near if t_in is None else np.maximum(t_in, near)
        t_out = far if t_out is None else np.minimum(t_out, far)
    return t_in, t_out


def _quadric(o: list, d: list) -> tuple[np.ndarray, np.ndarray]:
    a = sum(d_i * d_i for d_i in d) + np.float32(1e-20)
    b = sum(o_i * d_i for o_i, d_i in zip(o, d, strict=True))
    c = sum(o_i * o_i for o_i in o) - np.float32(1.0)
    root2 = b * b - a * c
    root = np.sqrt(np.maximum(root2, 0.0))
    miss = root2 < 0
    return np.where(miss, FAR, (-b - root) / a), np.where(miss, -FAR, (-b + root) / a)


def unfold(kind_N: np.ndarray, q_3N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Side, and texture place (u_N, v_N) in 0..1, of surface points given in unit coordinates q_3N."""
    magnitude = np.abs(q_3N)
    axis = np.where(magnitude[0] >= magnitude[1], 0, 1)
    axis = np.where(magnitude[2] > np.maximum(magnitude[0], magnitude[1]), 2, axis)
    negative = np.take_along_axis(q_3N, axis[None], 0)[0] < 0
    side = 2 * axis + negative
    u = _along(_RIGHT, side, q_3N)
    v = _along(_DOWN, side, q_3N)
    np.negative(u, where=kind_N == SHELL, out=u)  # seen from inside, right and left change places
    ball = np.flatnonzero(kind_N == BALL)
    if ball.size:
        x, y, z = q_3N[:, ball]
        scale = 1.0 / np.sqrt(1.0 + np.abs(x))  # Lambert's equal-area map of a half onto a disc
        side[ball], u[ball], v[ball] = x < 0, y * scale, -z * scale
    drum = np.flatnonzero(kind_N == DRUM)
    if drum.size:
        x, y, z = q_3N[:, drum]
        mantle = z * z < x * x + y * y
        side[drum] = np.where(mantle, 0, np.where(z > 0, 4, 5))
        u[drum] = np.where(mantle, np.arctan2(y, x) * np.float32(1.0 / np.pi), x)
        v[drum] = np.where(mantle, -z, np.where(z > 0, -y, y))
    return side, u * np.float32(0.5) + np.float32(0.5), v * np.float32(0.5) + np.float32(0.5)


def _along(table_63: np.ndarray, side_N: np.ndarray, q_3N: np.ndarray) -> np.ndarray:
    return sum(table_63[side_N, i] * q_3N[i] for i in range(3))


def fold(kind: int, side: int, u_N: np.ndarray, v_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `unfold` for one side: unit points q_N3 and unit-space outward gradients n_N3."""
    a, b = 2 * u_N - 1, 2 * v_N - 1
    if kind == BALL:
        rho2 = np.minimum(a * a + b * b, 1.0)
        stretch = np.sqrt(2.0 - rho2)
        q = np.stack([(1 - rho2) * (1 - 2 * side), a * stretch, -b * stretch], -1)
        q /= np.sqrt((q * q).sum(-1, keepdims=True))
        return q.astype(np.float32), q.astype(np.float32)
    if kind == DRUM and side == 0:
        n = np.stack([np.cos(a * np.pi), np.sin(a * np.pi), np.zeros_like(a)], -1)
        return (n - np.stack([0 * b, 0 * b, b], -1)).astype(np.float32), n.astype(np.float32)
    if kind == DRUM:
        shrink = 1.0 / np.maximum(1.0, np.sqrt(a * a + b * b))  # beyond the rim there is nothing to light
        a, b = a * shrink, b * shrink
    right = -_RIGHT[side] if kind == SHELL else _RIGHT[side]
    n = np.broadcast_to(_NORMALS[side] * (-1.0 if kind == SHELL else 1.0), (a.size, 3))
    q = _NORMALS[side] + a[:, None] * right + b[:, None] * _DOWN[side]
    return q.astype(np.float32), n.astype(np.float32)


def sides_of(kind: int) -> tuple[int, ...]:
    """The sides a kind of solid has."""
    return {BALL: (0, 1), DRUM: (0, 4, 5)}.get(kind, (0, 1, 2, 3, 4, 5))


def side_size(kind: int, side: int, half_3: np.ndarray) -> tuple[float, float]:
    """Width and height in metres of a side's texture."""
    x, y, z = (float(2 * h) for h in half_3)
    if kind == BALL:
        reach = float(np.sqrt(2.0)) * (x + y + z) / 3
        return reach, reach
    if kind == DRUM and side == 0:
        return float(np.pi) * (x + y) / 2, z
    return ((y, z), (x, z), (x, y))[side // 2]

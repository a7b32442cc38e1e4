"""A world whose warps are known in closed form: a wall, seen by cameras that stand anywhere in front of it.

Its colour says where on the wall a pixel is, so that features by colour find true matches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastmum.data.samples import Frame
from fastmum.geometry import Camera

WALL = 4.0  # metres from the origin along z
WIDE = 3.0  # metres that the colours span either way


@dataclass(frozen=True)
class Shot:
    """A camera in front of the wall: K (3, 3) in pixels, T (4, 4) world to camera, size (width, height)."""

    K: np.ndarray
    T: np.ndarray
    size: tuple[int, int]

    @property
    def T_world(self) -> np.ndarray:
        """Camera to world."""
        return np.linalg.inv(self.T)

    def wall(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points of the wall (N, 3) and their z-depth (N,) at pixel coordinates, the first centre at 0.5."""
        rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(self.K).T
        turned, eye = rays @ self.T_world[:3, :3].T, self.T_world[:3, 3]
        depth = (WALL - eye[2]) / turned[:, 2]
        return eye + turned * depth[:, None], depth

    def project(self, points: np.ndarray) -> np.ndarray:
        """Pixel coordinates (N, 2) of points of the world."""
        seen = (points @ self.T[:3, :3].T + self.T[:3, 3]) @ self.K.T
        return seen[:, :2] / seen[:, 2:]

    def depth(self) -> np.ndarray:
        """(height, width) float32."""
        return self._grid()[1].astype(np.float32)

    def image(self) -> Image.Image:
        """Red grows to the right on the wall, green downwards, blue waves."""
        points = self._grid()[0]
        share = np.clip(points[..., :2] / (2 * WIDE) + 0.5, 0, 1)
        blue = 0.5 + 0.5 * np.sin(7 * points[..., 0]) * np.cos(5 * points[..., 1])
        return Image.fromarray((np.concatenate([share, blue[..., None]], -1) * 255).round().astype(np.uint8))

    def frame(self, key: str = "") -> WallFrame:
        """A frame in memory."""
        return WallFrame(key, None, self.K, self.T, shot=self, depth_map=self.depth())

    def _grid(self) -> tuple[np.ndarray, np.ndarray]:
        width, height = self.size
        y, x = np.mgrid[:height, :width] + 0.5
        points, depth = self.wall(x.ravel(), y.ravel())
        return points.reshape(height, width, 3), depth.reshape(height, width)


@dataclass(frozen=True, eq=False)
class WallFrame(Frame):
    """A shot with a depth map of its own or another."""

    shot: Shot | None = None
    depth_map: np.ndarray | None = None

    def read_image(self) -> Image.Image:
        return self.shot.image()

    def read_camera(self) -> Camera:
        return Camera(self.K, self.camera_from_world, self.shot.size)

    def read_depth(self) -> np.ndarray:
        return self.depth_map


def shot(
    eye: tuple[float, float, float] = (0.0, 0.0, 0.0),
    turn: tuple[float, float, float] = (0.0, 0.0, 0.0),
    size: tuple[int, int] = (64, 48),
    focal: float = 60.0,
) -> Shot:
    """A camera at `eye`, turned by small angles about its x, y and z axes (radians)."""
    R = np.eye(3)
    for axis, angle in enumerate(turn):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        R = step @ R
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R, -R @ np.array(eye)
    K = np.array([[focal, 0, size[0] / 2], [0, focal, size[1] / 2], [0, 0, 1.0]])
    return Shot(K, T, size)


def walk(count: int) -> list[Shot]:
    """Cameras along the wall, each turned a little otherwise."""
    return [
        shot((0.25 * i - 0.3, 0.1 * np.sin(i), 0.05 * i), (0.05 * np.sin(2 * i), 0.06 - 0.04 * i, 0.03 * i))
        for i in range(count)
    ]


def exact(a: Shot, b: Shot, points: np.ndarray) -> np.ndarray:
    """The warp of unit coordinates (N, 2) from a to b in closed form."""
    pixels = points * np.array(a.size)
    on_wall, _ = a.wall(pixels[:, 0], pixels[:, 1])
    return b.project(on_wall) / np.array(b.size)

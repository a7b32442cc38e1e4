"""A scene whose warps have a closed form: a wall, seen by cameras in front of it.

The wall's colour encodes the position on it, so that colours as features give true matches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from fastmum.data.samples import Frame
from fastmum.geometry import Camera

WALL = 4.0  # metres from the origin along z
WIDE = 3.0  # metres from the centre to where the colours saturate


@dataclass(frozen=True)
class Shot:
    """A camera in front of the wall: K (3, 3) in pixels, T (4, 4) world to camera, size (width, height)."""

    K: np.ndarray
    T: np.ndarray
    size: tuple[int, int]

    def wall(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points of the wall (..., 3) and their z-depth (...) at pixel coordinates, the first centre at 0.5."""
        rays, world_from_camera = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(self.K).T, np.linalg.inv(self.T)
        turned, eye = rays @ world_from_camera[:3, :3].T, world_from_camera[:3, 3]
        depth = (WALL - eye[2]) / turned[..., 2]
        return eye + turned * depth[..., None], depth

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """`wall` at all pixel centres: (height, width, 3) and (height, width)."""
        y, x = np.mgrid[: self.size[1], : self.size[0]] + 0.5
        return self.wall(x, y)

    def depth(self) -> np.ndarray:
        """(height, width) float32."""
        return self.pixels()[1].astype(np.float32)

    def image(self) -> Image.Image:
        """Red grows to the right on the wall, green downwards, blue in waves."""
        x, y, _ = np.moveaxis(self.pixels()[0], -1, 0)
        colours = np.stack([x / (2 * WIDE), y / (2 * WIDE), 0.5 * np.sin(7 * x) * np.cos(5 * y)], -1) + 0.5
        return Image.fromarray((colours.clip(0, 1) * 255).round().astype(np.uint8))

    def save(self, image: Path, depth: Path, values: np.ndarray) -> None:
        """Write the image, and depth or counts of it to an HDF5 file or PNG."""
        for file in (image, depth):
            file.parent.mkdir(parents=True, exist_ok=True)
        self.image().save(image, quality=95)
        if depth.suffix == ".png":
            Image.fromarray(np.rint(values).astype(np.uint16)).save(depth)
        else:
            with h5py.File(depth, "w") as archive:
                archive["depth"] = values

    def frame(self, key: str = "") -> WallFrame:
        return WallFrame(key, None, self.K, self.T, shot=self, depth_map=self.depth())


@dataclass(frozen=True, eq=False)
class WallFrame(Frame):
    """A shot in memory, with its depth map or another."""

    shot: Shot | None = None
    depth_map: np.ndarray | None = None

    def read_image(self) -> Image.Image:
        return self.shot.image()

    def read_camera(self) -> Camera:
        return Camera(self.K, self.camera_from_world, self.shot.size)

    def read_depth(self) -> np.ndarray:
        return self.depth_map


def shot(eye=(0.0, 0.0, 0.0), turn=(0.0, 0.0, 0.0), size: tuple[int, int] = (64, 48), focal: float = 60.0) -> Shot:
    """A camera at `eye`, turned by small angles about its x, y and z axes (radians)."""
    T = np.eye(4)
    T[:3, :3] = Rotation.from_euler("xyz", turn).as_matrix()
    T[:3, 3] = -T[:3, :3] @ np.array(eye)
    return Shot(np.array([[focal, 0, size[0] / 2], [0, focal, size[1] / 2], [0, 0, 1.0]]), T, size)


def walk(count: int) -> list[Shot]:
    """Cameras along the wall with varied rotations."""
    return [
        shot((0.25 * i - 0.3, 0.1 * np.sin(i), 0.05 * i), (0.05 * np.sin(2 * i), 0.06 - 0.04 * i, 0.03 * i))
        for i in range(count)
    ]


def exact(a: Shot, b: Shot, points: np.ndarray) -> np.ndarray:
    """The warp of unit coordinates (N, 2) from a to b in closed form."""
    on_wall, _ = a.wall(*(points * np.array(a.size)).T)
    seen = (on_wall @ b.T[:3, :3].T + b.T[:3, 3]) @ b.K.T
    return seen[:, :2] / seen[:, 2:] / np.array(b.size)

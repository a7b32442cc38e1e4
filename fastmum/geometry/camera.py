"""Cameras. One convention everywhere:

- K is in pixels of the upright image. The image spans (0, 0) to (width, height), so the centre of the pixel in row i,
  column j is (j + 0.5, i + 0.5). Data sets and papers that put centres at integers need `centre + 0.5`.
- `camera_from_world` maps points of the world to camera axes, which are OpenCV's: x right, y down, z forward.
- Depth is z-depth in metres (or the unit of the poses), 0 where it is unknown.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

PYTORCH3D_TO_OPENCV = np.diag([-1.0, -1.0, 1.0])

NDC = Literal["ndc_norm_image_bounds", "ndc_isotropic", "vggt"]


@dataclass(frozen=True, eq=False)
class Camera:
    """Intrinsics and pose of an image."""

    K: np.ndarray  # (3, 3) float64, pixels; a mirrored image has a negative fx
    camera_from_world: np.ndarray  # (4, 4) float64; NaN where the pose is unknown
    size: tuple[int, int]  # width and height of the image in pixels

    def resized(self, size: tuple[int, int]) -> "Camera":
        """The camera of the same image at another resolution (width, height)."""
        scale = np.array([size[0] / self.size[0], size[1] / self.size[1], 1.0])
        return replace(self, K=scale[:, None] * self.K, size=size)


def intrinsics_matrix(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """K, (3, 3) float64."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float64)


def rigid_inverse(T: np.ndarray) -> np.ndarray:
    """Inverse of rotations with translations (..., 4, 4): the rotation is transposed."""
    inverse = np.zeros_like(T)
    inverse[..., :3, :3] = np.swapaxes(T[..., :3, :3], -1, -2)
    inverse[..., :3, 3:] = -inverse[..., :3, :3] @ T[..., :3, 3:]
    inverse[..., 3, 3] = 1
    return inverse


def relative_pose(T_a: np.ndarray, T_b: np.ndarray) -> np.ndarray:
    """Camera a to camera b, (..., 4, 4), from both world-to-camera matrices."""
    return T_b @ np.linalg.inv(T_a)


def quaternion(R: np.ndarray) -> np.ndarray:
    """Quaternions (..., 4), w x y z, of rotations (..., 3, 3); the sign is arbitrary. No projection to a rotation."""
    trace = np.trace(R, axis1=-2, axis2=-1)[..., None, None]
    products = np.empty((*R.shape[:-2], 4, 4), R.dtype)  # 4 q q^T
    products[..., 1:, 1:] = R + np.swapaxes(R, -1, -2) + (1 - trace) * np.eye(3)
    products[..., 0, 1:] = R[..., [2, 0, 1], [1, 2, 0]] - R[..., [1, 2, 0], [2, 0, 1]]
    products[..., 1:, 0], products[..., :1, 0] = products[..., 0, 1:], 1 + trace[..., 0]
    largest = products.diagonal(axis1=-2, axis2=-1).argmax(-1)[..., None]
    row = np.take_along_axis(products, largest[..., None], -2)[..., 0, :]
    return row / (2 * np.sqrt(np.take_along_axis(row, largest, -1)))


def pixel_rays(K: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Rays through the pixel centres of an image (height, width), (H, W, 3) float64 camera axes with z = 1."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    return np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(K).T


def unproject(depth: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Points of a depth map (H, W) in camera axes, (H, W, 3) float64; K belongs to the map's resolution."""
    return pixel_rays(K, depth.shape) * depth[..., None]


def transform(T: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a rigid or affine transform (4, 4) to points (..., 3)."""
    return points @ T[:3, :3].T + T[:3, 3]


def ray_to_z(distance: np.ndarray, K: np.ndarray) -> np.ndarray:
    """z-depth (H, W) from distances along the pixel rays; K belongs to the map's resolution. Keeps the dtype."""
    return (distance / np.linalg.norm(pixel_rays(K, distance.shape), axis=-1)).astype(distance.dtype)


def camera_from_pytorch3d(viewpoint: dict[str, Any], size: tuple[int, int], ndc: NDC | None = None) -> Camera:
    """The camera of a CO3D annotation; `size` is width and height of the image.

    PyTorch3D transforms row vectors, x_camera = x_world R + T, with x to the left and y up. NDC measures from the image
    centre to the left and up. ValueError for an unknown format.

    Args:
        viewpoint: R (3, 3), T (3), focal_length (2), principal_point (2), and perhaps intrinsics_format.
        ndc: unit of focal length and principal point: half sides ("ndc_norm_image_bounds"), half of the shorter side
            ("ndc_isotropic"), or VGGT's preprocessing: half of (side - 1) for the focal length and half of (shorter
            side - 1) for the principal point. None: the annotation's intrinsics_format, else half sides.
    """
    ndc = ndc or viewpoint.get("intrinsics_format", "ndc_norm_image_bounds")
    half = np.array(size) / 2
    shorter = half.min()
    units = {
        "ndc_norm_image_bounds": (half, half),
        "ndc_isotropic": (shorter, shorter),
        "vggt": (half - 0.5, shorter - 0.5),
    }
    if ndc not in units:
        raise ValueError(f"unknown intrinsics_format '{ndc}'")
    R, T = np.array(viewpoint["R"], np.float64), np.array(viewpoint["T"], np.float64)
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = PYTORCH3D_TO_OPENCV @ R.T, PYTORCH3D_TO_OPENCV @ T
    focal = np.array(viewpoint["focal_length"]) * units[ndc][0]
    centre = half - np.array(viewpoint["principal_point"]) * units[ndc][1]
    return Camera(intrinsics_matrix(*focal, *centre), pose, size)

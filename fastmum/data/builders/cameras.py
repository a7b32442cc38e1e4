"""Poses and intrinsics as data sets keep them, turned into world-to-camera with OpenCV axes and pixels.

OpenCV's camera looks along +z with x to the right and y down; OpenGL's (nerfstudio) along -z with y up; PyTorch3D's
(CO3D) along +z with x to the left and y up.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastmum.data.errors import DataError

OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


@contextlib.contextmanager
def reading(file: Path, what: str) -> Iterator[None]:
    """Turns whatever reading a file raises into one line that names it."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"'{file}' cannot be read as {what} ({reason}); restore the file or remove its scene") from None


def read_table(file: Path, columns: int, what: str, skip: int = 0) -> np.ndarray:
    """(lines, columns) float64 of a text file, without its first `skip` lines.

    Raises:
        DataError: other text, another number of columns, or no line.
    """
    with reading(file, f"{what}, {columns} numbers a line"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of numpy, about an empty file
        try:
            return np.loadtxt(file, ndmin=2, skiprows=skip).reshape(-1, columns)
        except UserWarning:
            raise ValueError("it is empty") from None


def world_to_camera(camera_to_world: np.ndarray) -> np.ndarray:
    """Inverse of rigid transforms (..., 4, 4), float32."""
    return np.linalg.inv(camera_to_world).astype(np.float32)


def rotation(axis_angle: np.ndarray) -> np.ndarray:
    """(3, 3) rotation matrix of a rotation vector in radians (Rodrigues)."""
    angle = np.linalg.norm(axis_angle)
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = axis_angle / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def by_name(names: Sequence[str], poses: Mapping[str, np.ndarray]) -> np.ndarray:
    """(n, 4, 4) float32: the pose of each name, NaN where there is none."""
    unknown = np.full((4, 4), np.nan)
    return np.array([poses.get(name, unknown) for name in names], np.float32).reshape(-1, 4, 4)


def read_nerfstudio(
    file: Path, names: Sequence[str], size: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Poses and intrinsics out of a nerfstudio `transforms.json`; lens distortion is left out.

    Args:
        file: the JSON.
        names: of the images, which the file may list in any folder.
        size: width and height of those images in pixels; the file's intrinsics may be of larger ones.

    Returns:
        (n, 4, 4) world-to-camera and (n, 4) intrinsics (None if `size` is), NaN for images that it does not list.

    Raises:
        DataError: a file that is not of the format.
    """
    with reading(file, "a nerfstudio transforms.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        listed = {f["file_path"].rpartition("/")[2]: f for f in content["frames"] + content.get("test_frames", [])}
        poses, intrinsics = {}, {}
        for name in listed.keys() & set(names):
            frame = content | listed[name]  # a frame's own camera goes before the common one
            poses[name] = world_to_camera(np.array(frame["transform_matrix"], float).reshape(4, 4) @ OPENGL_TO_OPENCV)
            if size is not None:
                scale = np.tile(np.array(size) / (frame["w"], frame["h"]), 2)
                intrinsics[name] = scale * [frame[key] for key in ("fl_x", "fl_y", "cx", "cy")]
    unknown = np.full(4, np.nan)
    focal = np.array([intrinsics.get(name, unknown) for name in names], np.float32) if size is not None else None
    return by_name(names, poses), focal


def image_size(folder: Path, names: Sequence[str]) -> tuple[int, int] | None:
    """Width and height of the images of a scene, which share one size, from the first that can be read."""
    for name in names[:5]:
        with contextlib.suppress(OSError, ValueError, SyntaxError), Image.open(folder / name) as image:
            return image.size
    return None

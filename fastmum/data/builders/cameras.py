"""Reading poses and intrinsics of data sets as camera_from_world with OpenCV axes, and pixels of the upright image.

Camera axes: OpenCV x right, y down, z forward; OpenGL (nerfstudio, Hypersim) x right, y up, z backward; PyTorch3D
(CO3D) x left, y up, z forward.
"""

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fastmum.data import errors
from fastmum.data.builders.base import Cameras
from fastmum.data.decode.image import UPRIGHT, FrameError, open_image, read_size
from fastmum.files import read_json

OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
# Turned camera axes of the EXIF orientations 3 (by 180 degrees), 6 (90 clockwise) and 8 (90 counter-clockwise).
TURNS = {3: [[-1, 0], [0, -1]], 6: [[0, -1], [1, 0]], 8: [[0, 1], [-1, 0]]}
SCANNET_DEPTH = 640, 480  # px, of the depth camera

reading = partial(errors.reading, remedy="restore the file or remove its scene")


def read_table(file: Path, columns: int, what: str, skip: int = 0) -> np.ndarray:
    """(lines, columns) float64 of a text file, without its first `skip` lines."""
    with reading(file, f"{what}, {columns} numbers a line"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # numpy warns about an empty file
        try:
            with file.open(encoding="utf-8-sig") as stream:
                return np.loadtxt(stream, ndmin=2, skiprows=skip).reshape(-1, columns)
        except UserWarning:
            raise ValueError("it is empty") from None


def from_K(K: np.ndarray) -> np.ndarray:
    """fx fy cx cy (4,) float32 of a matrix (3, 3)."""
    return np.array([K[0, 0], K[1, 1], K[0, 2], K[1, 2]], np.float32)


def scannet_intrinsics(colour: Sequence[np.ndarray], depth: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Of ScanNet's colour and depth intrinsics those of an image of `size` (width, height).

    Releases have images in the size of the colour or of the depth camera: the right one looks at their centre. If only
    the depth camera's are known, they are those of the image resized to `SCANNET_DEPTH`, as Reloc3r reads it.
    """
    width, height = size
    if not colour:
        return np.array([width / SCANNET_DEPTH[0], height / SCANNET_DEPTH[1], 1])[:, None] * depth[0][:3, :3]
    cameras = [K[:3, :3] for K in (*colour, *depth)]
    return min(cameras, key=lambda K: abs(K[0, 2] / width - 0.5) + abs(K[1, 2] / height - 0.5))


def inverse(world_from_camera: np.ndarray) -> np.ndarray:
    """camera_from_world (..., 4, 4) float32."""
    return np.linalg.inv(world_from_camera).astype(np.float32)


def from_opengl(world_from_camera: np.ndarray) -> np.ndarray:
    """camera_from_world (..., 4, 4) float32, OpenCV axes, of a camera with OpenGL's."""
    return inverse(world_from_camera @ OPENGL_TO_OPENCV)


def by_name(names: Sequence[str], values: Mapping[str, np.ndarray], shape: tuple[int, ...] = (4, 4)) -> np.ndarray:
    """(n, *shape) float32: the value of each name, NaN where there is none."""
    unknown = np.full(shape, np.nan)
    return np.array([values.get(name, unknown) for name in names], np.float32).reshape(-1, *shape)


def upright(file: Path, pose: np.ndarray, intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Turn the camera of an image that is stored rotated, as decoders turn the image by its EXIF tag.

    Takes camera_from_world (4, 4) and fx fy cx cy (4,) of the stored pixels. Returns those of the upright image (NaN
    for mirrored images, which no rigid motion describes), and whether the image is turned or mirrored. An image that
    cannot be read counts as upright.
    """
    try:
        orientation, width, height = read_size(file)
    except FrameError:
        orientation = UPRIGHT
    if orientation == UPRIGHT:
        return pose, intrinsics, False
    if orientation not in TURNS:
        return np.full_like(pose, np.nan), np.full_like(intrinsics, np.nan), True
    turn = np.array(TURNS[orientation])
    axes = np.eye(4)
    axes[:2, :2] = turn
    fx_fy = np.abs(turn) @ intrinsics[:2]
    # An axis that points the other way starts at the opposite side of the image.
    centre = turn @ intrinsics[2:] + (turn < 0).any(1) * np.array([width, height])
    return axes @ pose, np.concatenate([fx_fy, centre]), True


def read_nerfstudio(file: Path, names: Sequence[str], images: Path) -> Cameras:
    """Poses and intrinsics from a nerfstudio `transforms.json`, without lens distortion; None if it is missing.

    The file may list the images in any folder, and its intrinsics may be for larger ones than those in `images`.
    Images that are not listed get NaN; intrinsics are None if no image is readable.
    """
    if not file.is_file():
        return None, None
    size = image_size(images, names)
    with reading(file, "a nerfstudio transforms.json"):
        content = read_json(file)
        listed = {f["file_path"].rpartition("/")[2]: f for f in content["frames"] + content.get("test_frames", [])}
        poses, intrinsics = {}, {}
        for name in listed.keys() & set(names):
            frame = content | listed[name]  # a frame's camera overrides the common one
            poses[name] = from_opengl(np.array(frame["transform_matrix"], float).reshape(4, 4))
            if size is not None:
                scale = np.tile(np.array(size) / (frame["w"], frame["h"]), 2)
                intrinsics[name] = scale * [frame[key] for key in ("fl_x", "fl_y", "cx", "cy")]
    return by_name(names, poses), None if size is None else by_name(names, intrinsics, (4,))


def image_size(folder: Path, names: Sequence[str]) -> tuple[int, int] | None:
    """Width and height of the images of a scene, which share one size, from the first readable one."""
    for name in names[:5]:
        with contextlib.suppress(FrameError), open_image(folder / name) as image:
            return image.size
    return None

"""Reading sparse COLMAP reconstructions: which image sees which 3-D points, from where, with which camera."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import threading
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from fastmum.data.errors import DataError

PARTS = ("cameras", "images", "points3D")  # rigs and frames came later, and most models have none
LENGTH = struct.Struct("<Q")
POINT_NUMBER = attrgetter("point3D_id")


class Model(NamedTuple):
    """The registered images of a reconstruction, in the order of their COLMAP numbers.

    Args:
        names: (n) image names: paths below the folder of images, '/'-separated.
        poses: (n, 4, 4) float64 world-to-camera, OpenCV axes.
        intrinsics: (n, 4) float64 fx fy cx cy in pixels, the centre of the first pixel at (0.5, 0.5), without the
            camera's distortion; NaN for cameras that have no focal length (panoramas).
        images, points: (m,) int32 and int64, image 0..n-1 and point 0..p-1 of every observation, grouped by image.
    """

    names: tuple[str, ...]
    poses: np.ndarray
    intrinsics: np.ndarray
    images: np.ndarray
    points: np.ndarray

    def select(self, keep: np.ndarray) -> Model:
        """The images whose entry in `keep` (n,) bool is true, numbered anew; points keep their numbers."""
        number = np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32)[self.images]
        seen = number >= 0
        names = tuple(name for name, kept in zip(self.names, keep, strict=True) if kept)
        return Model(names, self.poses[keep], self.intrinsics[keep], number[seen], self.points[seen])


def find_format(folder: Path) -> str:
    """`".bin"` or `".txt"`: what the model in a folder is written in, the binary files where both are there.

    Raises:
        DataError: files are missing or empty.
    """
    try:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    except OSError as error:
        raise DataError(f"'{folder}' cannot be read as a COLMAP model ({error.strerror})") from None
    lacking = {suffix: [p + suffix for p in PARTS if not sizes.get(p + suffix)] for suffix in (".bin", ".txt")}
    suffix = min(lacking, key=lambda suffix: len(lacking[suffix]))
    if not lacking[suffix]:
        return suffix
    raise DataError(
        f"the COLMAP model in '{folder}' is not whole: {', '.join(lacking[suffix])} missing or empty; "
        "a model is cameras, images and points3D, all .bin or all .txt"
    )


def read_model(folder: str | Path) -> Model:
    """Read the model in a folder.

    Raises:
        DataError: no model in the folder, one that is broken, or pycolmap is not installed.
    """
    folder = Path(folder)
    suffix = find_format(folder)
    pycolmap = import_pycolmap()
    if suffix == ".bin":
        _check_length(folder / "points3D.bin")
    reconstruction = pycolmap.Reconstruction()
    verbosity = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = pycolmap.logging.Level.FATAL.value  # it would print what it raises
    try:
        reconstruction.read_binary(folder) if suffix == ".bin" else reconstruction.read_text(folder)
    # What pycolmap raises depends on the byte that is wrong; lengths that make no sense end in a MemoryError.
    except (ValueError, IndexError, RuntimeError, OSError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the COLMAP model in '{folder}' ({suffix}) cannot be read: {reason}; copy it again") from error
    finally:
        pycolmap.logging.minloglevel = verbosity
    return _to_model(reconstruction, folder)


def _check_length(points: Path) -> None:
    """Walk over a points3D.bin: pycolmap reads on where it ends too early, for minutes or until memory is full."""
    # number uint64, position 3 doubles, colour 3 bytes, error double, length of the track uint64, track 2 x uint32 each
    before_length, fixed, each = 43, 51, 8
    with points.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position = 8
        try:
            for _ in range(LENGTH.unpack_from(data)[0]):
                position += fixed + each * LENGTH.unpack_from(data, position + before_length)[0]
            whole = position == len(data)
        except (struct.error, OverflowError):  # beyond the end
            whole = False
    if not whole:
        raise DataError(f"'{points}' is not a whole COLMAP file of points; copy it again")


def _to_model(reconstruction: object, folder: Path) -> Model:
    images = [image for _, image in sorted(reconstruction.images.items()) if image.has_pose]
    if not images:
        raise DataError(f"the COLMAP model in '{folder}' has no registered image; leave the folder out")
    names = tuple(image.name.replace("\\", "/") for image in images)
    poses = np.tile(np.eye(4), (len(images), 1, 1))
    poses[:, :3] = [image.cam_from_world().matrix() for image in images]
    cameras = {number: _pinhole(camera) for number, camera in reconstruction.cameras.items()}
    intrinsics = np.array([cameras[image.camera_id] for image in images])

    seen = [_points_of(image) for image in images]
    numbers, points = np.unique(np.concatenate(seen), return_inverse=True)
    # COLMAP reads a file of points that is cut off without a word.
    if len(numbers) > reconstruction.num_points3D():
        raise DataError(
            f"the COLMAP model in '{folder}' is not whole: its images see {len(numbers)} points, "
            f"but it has {reconstruction.num_points3D()}; copy it again"
        )
    rows = np.repeat(np.arange(len(images), dtype=np.int32), [len(s) for s in seen])
    return Model(names, poses, intrinsics, rows, points)


def _points_of(image: object) -> np.ndarray:
    observations = image.get_observation_points2D()
    return np.fromiter(map(POINT_NUMBER, observations), np.uint64, len(observations))


def _pinhole(camera: object) -> tuple[float, float, float, float]:
    if not len(camera.focal_length_idxs()):  # asking such a camera for it would end the process
        return (np.nan,) * 4
    return camera.focal_length_x, camera.focal_length_y, camera.principal_point_x, camera.principal_point_y


def import_pycolmap() -> ModuleType:
    """pycolmap, an optional extra.

    Raises:
        DataError: it is not installed.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        import pycolmap
    except ImportError as error:
        raise DataError("reading COLMAP models needs pycolmap: pip install 'fastmum[colmap]'") from error
    if threading.current_thread() is threading.main_thread():  # no other may
        for number, handler in handlers.items():  # its import puts one of its own in place, which ends in a crash
            if handler is not None:
                signal.signal(number, handler)
    return pycolmap

"""Writing COLMAP reconstructions in which every image has a camera and every point is seen in one image."""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmum.data.colmap import CAMERAS, POINTS_2D
from fastmum.errors import FastmumError, writing
from fastmum.files import write_atomic
from fastmum.geometry import Camera
from fastmum.geometry.camera import quaternion

PINHOLE = [name for name, _, _ in CAMERAS].index("PINHOLE")
POINT = np.dtype(
    [("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("length", "<u8"), ("image", "<u4"),
     ("index", "<u4")]
)  # fmt: skip


class Points(NamedTuple):
    """Points with the pixel that each was found at."""

    xyz: np.ndarray  # (N, 3) world
    rgb: np.ndarray  # (N, 3) uint8
    image: np.ndarray  # (N,) int64, ascending, number of the image
    xy: np.ndarray  # (N, 2) pixels of that image, centres at +0.5


def write_model(folder: Path, names: list[str], cameras: list[Camera], points: Points) -> None:
    """Write cameras.bin, images.bin and points3D.bin; images are numbered from 1. FastmumError: it cannot be written.

    Args:
        names: paths of the images below the folder of images, '/'-separated.
    """
    numbers = range(1, len(names) + 1)
    ids = np.arange(1, len(points.xyz) + 1)
    counts = np.bincount(points.image, minlength=len(names))
    starts = np.cumsum(counts) - counts
    camera_records, image_records = [], []
    for number, name, camera, start, count in zip(numbers, names, cameras, starts, counts, strict=True):
        parameters = camera.K[[0, 1, 0, 1], [0, 1, 2, 2]]
        camera_records.append(struct.pack("<IiQQ4d", number, PINHOLE, *camera.size, *parameters))
        pose, own = camera.camera_from_world.astype(np.float64), slice(start, start + count)
        features = np.empty(count, POINTS_2D)
        features["x"], features["y"], features["point"] = *points.xy[own].T, ids[own]
        motion = *quaternion(pose[:3, :3]), *pose[:3, 3]
        head = struct.pack("<I7dI", number, *motion, number) + name.encode(errors="surrogateescape")
        image_records.append(head + struct.pack("<xQ", count) + features.tobytes())
    records = np.zeros(len(ids), POINT)
    records["id"], records["xyz"], records["rgb"], records["length"] = ids, points.xyz, points.rgb, 1
    records["image"], records["index"] = points.image + 1, np.arange(len(ids)) - starts[points.image]
    with writing(folder, FastmumError):
        folder.mkdir(parents=True, exist_ok=True)
        for file, parts in (("cameras", camera_records), ("images", image_records)):
            write_atomic(folder / f"{file}.bin", struct.pack("<Q", len(names)) + b"".join(parts))
        write_atomic(folder / "points3D.bin", struct.pack("<Q", len(ids)) + records.tobytes())

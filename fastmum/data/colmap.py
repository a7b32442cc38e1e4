"""Reading sparse COLMAP reconstructions: poses and cameras of the images, and which 3-D points each image sees."""

import itertools
import logging
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmum.data.errors import DataError, reading

log = logging.getLogger(__name__)

PARTS = ("cameras", "images", "points3D")  # rigs and frames came later, and most models have none
# COLMAP's camera models by number: name, parameters, focal lengths (1: f cx cy ..., 2: fx fy cx cy ..., 0: panorama).
CAMERAS = (
    ("SIMPLE_PINHOLE", 3, 1), ("PINHOLE", 4, 2), ("SIMPLE_RADIAL", 4, 1), ("RADIAL", 5, 1), ("OPENCV", 8, 2),
    ("OPENCV_FISHEYE", 8, 2), ("FULL_OPENCV", 12, 2), ("FOV", 5, 2), ("SIMPLE_RADIAL_FISHEYE", 4, 1),
    ("RADIAL_FISHEYE", 5, 1), ("THIN_PRISM_FISHEYE", 12, 2), ("RAD_TAN_THIN_PRISM_FISHEYE", 16, 2),
    ("SIMPLE_DIVISION", 4, 1), ("DIVISION", 5, 2), ("SIMPLE_FISHEYE", 3, 1), ("FISHEYE", 4, 2), ("EUCM", 6, 2),
    ("EQUIRECTANGULAR", 2, 0),
)  # fmt: skip
NO_POINT = -1
POINT_BYTES, OBSERVATION_BYTES = 51, 8  # in points3D.bin; the length of a point's track is in the last 8 of its 51
POINTS_2D = np.dtype([("x", "<f8"), ("y", "<f8"), ("point", "<i8")])


class Model(NamedTuple):
    """The n registered images of a reconstruction, in the order of their COLMAP numbers.

    Intrinsics: pixel centres at +0.5, no lens distortion, NaN for panoramas, which have no focal length.
    """

    names: tuple[str, ...]  # (n) paths below the folder of images, '/'-separated
    poses: np.ndarray  # (n, 4, 4) float64 camera_from_world, OpenCV axes
    intrinsics: np.ndarray  # (n, 4) float64 fx fy cx cy in stored pixels
    images: np.ndarray  # (m,) int32, image 0..n-1 of every observation, grouped by image
    points: np.ndarray  # (m,) int64, point 0..p-1 of every observation
    positions: np.ndarray | None = None  # (m, 2) float32, pixels of every observation; if coordinates were read
    xyz: np.ndarray | None = None  # (p, 3) float64, the points in the world; if coordinates were read

    def select(self, keep: np.ndarray) -> "Model":
        """The images where `keep` (n,) bool is true, renumbered; points keep their numbers."""
        number = np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32)[self.images]
        seen = number >= 0
        names = tuple(name for name, kept in zip(self.names, keep, strict=True) if kept)
        positions = None if self.positions is None else self.positions[seen]
        selected = Model(names, self.poses[keep], self.intrinsics[keep], number[seen], self.points[seen])
        return selected._replace(positions=positions, xyz=self.xyz)


# Number, name, quaternion w x y z and translation (7,), camera, numbers of 3-D points (k,), `NO_POINT` for none, and
# their pixels (k, 2).
Image = tuple[int, str, np.ndarray, int, np.ndarray, np.ndarray]


def find_format(folder: Path) -> str:
    """`".bin"` or `".txt"`, the binary files if both are complete; raises DataError if files are missing or empty."""
    with reading(folder, "a COLMAP model"):
        folder.stat()
        names = [part + suffix for part in PARTS for suffix in (".bin", ".txt")]
        sizes = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
    lacking = {suffix: [p + suffix for p in PARTS if not sizes.get(p + suffix)] for suffix in (".bin", ".txt")}
    suffix = min(lacking, key=lambda suffix: len(lacking[suffix]))
    if lacking[suffix]:
        whole = "a model is cameras, images and points3D, all .bin or all .txt"
        missing = ", ".join(lacking[suffix])
        raise DataError(f"the COLMAP model in '{folder}' is not whole: {missing} missing or empty; {whole}")
    return suffix


def read_model(folder: str | Path, coordinates: bool = False) -> Model:
    """Read the model in a folder, with or without coordinates of points; raises DataError if none is whole.

    Of an image that is registered several times, the one of the lowest number is taken, which is logged.
    """
    from scipy.spatial.transform import Rotation  # slow to import

    folder = folder if isinstance(folder, Path) else Path(folder)
    suffix = find_format(folder)
    read_cameras, read_images = {".bin": (_cameras_bin, _images_bin), ".txt": (_cameras_txt, _images_txt)}[suffix]
    with reading(file := folder / f"cameras{suffix}", "cameras of a COLMAP model", "copy it again"):
        cameras = dict(read_cameras(file))
    with reading(file := folder / f"images{suffix}", "images of a COLMAP model", "copy it again"):
        images = sorted(read_images(file), key=lambda image: image[0])
        if not images:
            raise DataError(f"the COLMAP model in '{folder}' has no registered image; leave the folder out")
        if suffix == ".txt":
            _warn_if_cut(file, len(images))
        _, names, motions, numbers, features, pixels = zip(*images, strict=True)
        if unknown := sorted(set(numbers) - cameras.keys()):
            raise ValueError(f"it has images of the camera {unknown[0]}, which cameras{suffix} does not have")
        intrinsics, motion = np.array([cameras[number] for number in numbers]), np.array(motions)
        poses = np.tile(np.eye(4), (len(images), 1, 1))
        poses[:, :3, :3] = Rotation.from_quat(motion[:, [1, 2, 3, 0]]).as_matrix()
        poses[:, :3, 3] = motion[:, 4:]
    seen = [points[points != NO_POINT] for points in features]
    rows = np.repeat(np.arange(len(images), dtype=np.int32), [len(points) for points in seen])
    if suffix == ".bin":
        with reading(file := folder / "points3D.bin", "points of a COLMAP model", "copy it again"):
            _check_points(file, len(rows))
    ids, points = np.unique(np.concatenate(seen), return_inverse=True)
    model = Model(tuple(name.replace("\\", "/") for name in names), poses, intrinsics, rows, points)
    if coordinates:
        kept = [each[points != NO_POINT] for each, points in zip(pixels, features, strict=True)]
        xyz = _read_points(folder / f"points3D{suffix}", ids)
        model = model._replace(positions=np.concatenate(kept).astype(np.float32), xyz=xyz)
    first = np.unique(model.names, return_index=True)[1]
    if len(first) == len(names):
        return model
    log.warning("%d of %d images of '%s' are registered again", len(names) - len(first), len(names), folder)
    return model.select(np.isin(np.arange(len(names)), first))


def _pinhole(number: int, parameters: np.ndarray) -> tuple[float, ...]:
    _, count, focal = CAMERAS[number]
    if len(parameters) != count:
        raise ValueError(f"{len(parameters)} parameters of the camera model {CAMERAS[number][0]}")
    values = parameters.tolist()
    if focal and not min(values[:focal]) > 0:
        raise ValueError(f"a focal length of {min(values[:focal])}")
    return (values[0], *values[:3]) if focal == 1 else tuple(values[:4]) if focal else (np.nan,) * 4


def _cameras_bin(file: Path) -> Iterator[tuple[int, tuple[float, ...]]]:
    data, position = file.read_bytes(), 8
    for _ in range(struct.unpack_from("<Q", data)[0]):
        number, model, _, _ = struct.unpack_from("<IiQQ", data, position)
        if model not in range(len(CAMERAS)):
            raise ValueError(f"the camera model {model} is unknown")
        parameters = np.frombuffer(data, "<f8", CAMERAS[model][1], position + 24)
        yield number, _pinhole(model, parameters)
        position += 24 + parameters.nbytes
    _check_end(data, position)


def _images_bin(file: Path) -> Iterator[Image]:
    data, position = file.read_bytes(), 8
    for _ in range(struct.unpack_from("<Q", data)[0]):
        number, *values, camera = struct.unpack_from("<I7dI", data, position)
        position += 64
        end = data.index(b"\0", position)
        name, count = data[position:end].decode(), struct.unpack_from("<Q", data, end + 1)[0]
        features = np.frombuffer(data, POINTS_2D, count, end + 9)
        pixels = np.frombuffer(data, "<f8", 3 * count, end + 9).reshape(-1, 3)[:, :2]
        yield number, name, np.array(values), camera, features["point"], pixels
        position = end + 9 + features.nbytes
    _check_end(data, position)


def _check_points(file: Path, observations: int) -> None:
    """Raise an error if points3D.bin is cut. Its records are only read if it is too short for all observations."""
    with file.open("rb") as stream:
        (count,) = struct.unpack("<Q", stream.read(8))
    if file.stat().st_size < 8 + POINT_BYTES * count + OBSERVATION_BYTES * observations:
        data, position = file.read_bytes(), 8
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, position + POINT_BYTES - 8)
            position += POINT_BYTES + OBSERVATION_BYTES * length
        _check_end(data, position)


def _read_points(file: Path, ids: np.ndarray) -> np.ndarray:
    """Coordinates (p, 3) float64 of the points with these ascending numbers (p,)."""
    with reading(file, "points of a COLMAP model", "copy it again"):
        if file.suffix == ".bin":
            data, position, records = file.read_bytes(), 8, []
            for _ in range(struct.unpack_from("<Q", data)[0]):
                number, *xyz, length = struct.unpack_from("<Q3d11xQ", data, position)
                records.append((number, xyz))
                position += POINT_BYTES + OBSERVATION_BYTES * length
        else:
            lines = (line.split(maxsplit=4) for line in _lines(file) if line)
            records = [(int(number), [*map(float, xyz)]) for number, *xyz, _ in lines]
        found = dict(records)
        return np.array([found[number] for number in ids.tolist()], np.float64).reshape(-1, 3)


def _check_end(data: bytes, position: int) -> None:
    if position != len(data):
        raise ValueError(f"its records take {position} bytes, but it has {len(data)}")


def _lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as stream:
        yield from (line.strip() for line in stream if not line.startswith("#"))


def _cameras_txt(file: Path) -> Iterator[tuple[int, tuple[float, ...]]]:
    names = [name for name, _, _ in CAMERAS]
    for line in filter(None, _lines(file)):
        number, name, _, _, *parameters = line.split()
        if name not in names:
            raise ValueError(f"the camera model {name} is unknown")
        yield int(number), _pinhole(names.index(name), np.array(parameters, np.float64))


def _warn_if_cut(file: Path, images: int) -> None:
    """Log if the header of images.txt states more images: it was cut at the end of a line, or some were taken out."""
    with file.open(encoding="utf-8-sig") as stream:
        header = "".join(itertools.takewhile(lambda line: line.startswith("#"), stream))
    stated = re.search(r"^# Number of images: (\d+)", header, re.MULTILINE)
    if stated and int(stated[1]) > images:
        log.warning("'%s' has %d images, but states %s: copy it again if it is cut off", file, images, stated[1])


def _images_txt(file: Path) -> Iterator[Image]:
    lines = _lines(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # numpy warns about text that is not numbers
        for line in lines:
            if line:
                number, *values, camera, name = line.split(maxsplit=9)
                features = np.fromstring(next(lines, ""), sep=" ").reshape(-1, 3)
                points = features[:, 2].astype(np.int64)
                yield int(number), name, np.array(values, np.float64), int(camera), points, features[:, :2]

"""ARKitScenes: chunks of the frames of the wide camera, with poses, intrinsics and depth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.cameras import by_name, read_table, rotation
from fastmum.data.depth import DepthFormat
from fastmum.data.manifest import SequenceRecord

RELEASED_CHUNK = 75
IMAGES = "lowres_wide"
TRAINING = "3dod/Training"
# Seconds: names and trajectory round time stamps differently, and poses come at 10 Hz.
TIME_TOLERANCE = 5e-3
# "uint16 png format in millimeters" (DATA.md of the data set), z: its tools unproject x = (u - cx) z / fx.
DEPTH = DepthFormat("png16", unit=1e-3)


def parts(root: Path, options: Options) -> list[str]:
    """Scans of the training split."""
    scans = base.folders_in(root / TRAINING)
    return [scan for scan in scans if (root / TRAINING / scan / f"{scan}_frames" / IMAGES).is_dir()]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The scan in chunks."""
    folder = f"{TRAINING}/{part}/{part}_frames"
    names = base.images_in(root / folder / IMAGES)
    scan = SequenceRecord(part, [f"{folder}/{IMAGES}/{name}" for name in names])
    if options.poses and names:
        scan = scan._replace(poses=_poses(root / folder, names), intrinsics=_intrinsics(root / folder, names))
    if options.depth:
        depths = base.existing(root, [f"{folder}/lowres_depth/{name}" for name in names])
        scan = scan._replace(depths=depths, depth_format=DEPTH)
    yield from base.chunks(scan, options, RELEASED_CHUNK)


def _poses(folder: Path, names: list[str]) -> np.ndarray | None:
    """Lines of seconds, rotation vector, translation: camera_from_world, OpenCV axes (the data set's code)."""
    file = folder / f"{IMAGES}.traj"
    if not file.is_file():
        return None
    lines = read_table(file, 7, "a trajectory")
    lines = lines[np.argsort(lines[:, 0])]
    times = np.array([_seconds(name) for name in names])
    nearest = np.searchsorted((lines[1:, 0] + lines[:-1, 0]) / 2, times)
    poses = np.full((len(names), 4, 4), np.nan, np.float32)
    for i in np.flatnonzero(np.abs(lines[nearest, 0] - times) < TIME_TOLERANCE):
        line = lines[nearest[i]]
        poses[i] = np.eye(4)
        poses[i, :3, :3], poses[i, :3, 3] = rotation(line[1:4]), line[4:]
    return poses


def _intrinsics(folder: Path, names: list[str]) -> np.ndarray:
    """`width height fx fy cx cy` in one file per frame."""
    files = {name: folder / f"{IMAGES}_intrinsics" / f"{_stem(name)}.pincam" for name in names}
    found = {name: read_table(file, 6, "intrinsics")[0, 2:] for name, file in files.items() if file.is_file()}
    return by_name(names, found, (4,))


def _stem(name: str) -> str:
    return name.rpartition(".")[0]  # names contain seconds with a decimal point


def _seconds(name: str) -> float:
    try:
        return float(_stem(name).rpartition("_")[2])
    except ValueError:
        return np.nan


BUILDER = Builder(
    layout=f"{TRAINING}/<id>/<id>_frames/{IMAGES}/*.png; optional: {IMAGES}.traj, {IMAGES}_intrinsics, lowres_depth",
    paper=base.CHUNK_RULE,
    released=f"chunks of {RELEASED_CHUNK}, the last one takes the rest",
    parts=parts,
    sequences=sequences,
    options=base.CHUNK_OPTIONS | base.CAMERA_OPTIONS | base.DEPTH_OPTIONS,
)

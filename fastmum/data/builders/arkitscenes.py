"""ARKitScenes: chunks of the wide camera's frames, with poses and intrinsics where they are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.cameras import read_table, rotation
from fastmum.data.builders.listing import folders_in, images_in
from fastmum.data.builders.scene import CHUNK_OPTIONS, CHUNK_RULE, POSES, chunks
from fastmum.data.manifest import SequenceRecord

RELEASED_CHUNK = 75
IMAGES = "lowres_wide"
TRAINING = "3dod/Training"
SAME_TIME = 5e-3  # seconds; time stamps are rounded differently in names and trajectory, and poses come at 10 Hz


def parts(root: Path, options: Options) -> list[str]:
    """Scans of the training split."""
    return [
        scan for scan in folders_in(root / TRAINING) if (root / TRAINING / scan / f"{scan}_frames" / IMAGES).is_dir()
    ]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The scan in chunks."""
    folder = f"{TRAINING}/{part}/{part}_frames"
    names = images_in(root / folder / IMAGES)
    poses = intrinsics = None
    if options.poses and names:
        poses, intrinsics = _poses(root / folder, names), _intrinsics(root / folder, names)
    scene = SequenceRecord(part, [f"{folder}/{IMAGES}/{name}" for name in names], poses, intrinsics)
    yield from chunks(scene, options, RELEASED_CHUNK)


def _poses(folder: Path, names: list[str]) -> np.ndarray | None:
    """A line a pose: seconds, rotation vector, translation, world-to-camera, OpenCV axes (the data set's code)."""
    file = folder / f"{IMAGES}.traj"
    if not file.is_file():
        return None
    lines = read_table(file, 7, "a trajectory")
    lines = lines[np.argsort(lines[:, 0])]
    times = np.array([_seconds(name) for name in names])
    nearest = np.searchsorted((lines[1:, 0] + lines[:-1, 0]) / 2, times)
    poses = np.full((len(names), 4, 4), np.nan, np.float32)
    for i in np.flatnonzero(np.abs(lines[nearest, 0] - times) < SAME_TIME):
        line = lines[nearest[i]]
        poses[i] = np.eye(4)
        poses[i, :3, :3], poses[i, :3, 3] = rotation(line[1:4]), line[4:]
    return poses


def _intrinsics(folder: Path, names: list[str]) -> np.ndarray | None:
    """`width height fx fy cx cy` in a file a frame."""
    folder = folder / f"{IMAGES}_intrinsics"
    if not folder.is_dir():
        return None
    intrinsics = np.full((len(names), 4), np.nan, np.float32)
    for i, name in enumerate(names):
        file = folder / f"{_stem(name)}.pincam"
        if file.is_file():
            intrinsics[i] = read_table(file, 6, "intrinsics")[0, 2:]
    return intrinsics


def _stem(name: str) -> str:
    return name.rpartition(".")[0]  # the name holds seconds with a point


def _seconds(name: str) -> float:
    try:
        return float(_stem(name).rpartition("_")[2])
    except ValueError:
        return np.nan


BUILDER = Builder(
    layout=f"{TRAINING}/<id>/<id>_frames/{IMAGES}/*.png, and {IMAGES}.traj and {IMAGES}_intrinsics if poses are wanted",
    paper=CHUNK_RULE,
    released=f"chunks of {RELEASED_CHUNK}, the last one takes the rest",
    parts=parts,
    sequences=sequences,
    options=CHUNK_OPTIONS | {"poses": POSES},
)

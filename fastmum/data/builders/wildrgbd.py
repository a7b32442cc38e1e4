"""WildRGB-D: whole videos of objects, with poses and intrinsics where they are there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.cameras import by_name, read_table, reading, world_to_camera
from fastmum.data.builders.listing import folders_in, images_in
from fastmum.data.builders.scene import MIN_FRAMES, POSES, whole
from fastmum.data.manifest import SequenceRecord


def parts(root: Path, options: Options) -> list[str]:
    """Videos, `<category>/scenes/<name>`."""
    return [
        f"{category}/scenes/{scene}"
        for category in folders_in(root)
        for scene in folders_in(root / category / "scenes")
    ]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The whole video."""
    names = images_in(root / part / "rgb")
    poses = intrinsics = None
    if options.poses and names:
        poses, intrinsics = _poses(root / part, names), _intrinsics(root / part, len(names))
    frames = [f"{part}/rgb/{name}" for name in names]
    yield from whole(SequenceRecord(part.replace("/scenes/", "/"), frames, poses, intrinsics), options)


def _poses(folder: Path, names: list[str]) -> np.ndarray | None:
    """A line a frame: its number, then camera-to-world row by row, OpenCV axes (the data set's README)."""
    file = folder / "cam_poses.txt"
    if not file.is_file():
        return None
    lines = read_table(file, 17, "poses")
    with reading(file, "poses"):  # a matrix may have no inverse
        poses = world_to_camera(lines[:, 1:].reshape(-1, 4, 4))
    by_number = dict(zip(lines[:, 0].astype(int).tolist(), poses, strict=True))
    numbers = {name: int(stem) for name in names if (stem := name.partition(".")[0]).isdecimal()}
    known = {name: by_number[number] for name, number in numbers.items() if number in by_number}
    return by_name(names, known)


def _intrinsics(folder: Path, num_frames: int) -> np.ndarray | None:
    """K column by column, the same for all frames."""
    file = folder / "metadata"
    if not file.is_file():
        return None
    with reading(file, "a video's metadata"):
        K = np.array(json.loads(file.read_text(encoding="utf-8"))["K"], float).reshape(3, 3).T
    return np.tile(np.float32([K[0, 0], K[1, 1], K[0, 2], K[1, 2]]), (num_frames, 1))


BUILDER = Builder(
    layout="<category>/scenes/<video>/rgb/*, and cam_poses.txt and metadata if poses are wanted",
    paper="the whole video, if it has at least 24 frames",
    parts=parts,
    sequences=sequences,
    options={"min_frames": MIN_FRAMES._replace(default=24), "poses": POSES},
)

"""WildRGB-D: whole videos of objects, with poses, intrinsics, depth and masks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.cameras import by_name, inverse, read_table, reading
from fastmum.data.depth import DepthFormat
from fastmum.data.manifest import SequenceRecord

# "depth scale of 1000 ... in meters" (README of the data set); z, as its script of point clouds unprojects it.
DEPTH = DepthFormat("png16", unit=1e-3)


def parts(root: Path, options: Options) -> list[str]:
    """Videos, `<category>/scenes/<name>`."""
    folders = [f"{category}/scenes" for category in base.folders_in(root)]
    return [f"{folder}/{scene}" for folder in folders for scene in base.folders_in(root / folder)]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The whole video."""
    names = base.images_in(root / part / "rgb")
    video = SequenceRecord(part.replace("/scenes/", "/"), [f"{part}/rgb/{name}" for name in names])
    if options.poses and names:
        video = video._replace(poses=_poses(root / part, names), intrinsics=_intrinsics(root / part, len(names)))
    if options.depth:
        depths, masks = (
            base.existing(root, [f"{part}/{kind}/{name}" for name in names]) for kind in ("depth", "masks")
        )
        video = video._replace(depths=depths, masks=masks, depth_format=DEPTH)
    yield from base.whole(video, options)


def _poses(folder: Path, names: list[str]) -> np.ndarray | None:
    """Lines of a frame's number and world_from_camera row by row, OpenCV axes (README of the data set)."""
    file = folder / "cam_poses.txt"
    if not file.is_file():
        return None
    lines = read_table(file, 17, "poses")
    with reading(file, "poses"):  # a matrix may be singular
        poses = inverse(lines[:, 1:].reshape(-1, 4, 4))
    by_number = dict(zip(lines[:, 0].astype(int).tolist(), poses, strict=True))
    numbers = {name: int(stem) for name in names if (stem := name.partition(".")[0]).isdecimal()}
    return by_name(names, {name: by_number[number] for name, number in numbers.items() if number in by_number})


def _intrinsics(folder: Path, num_frames: int) -> np.ndarray | None:
    """K column by column, the same for all frames."""
    file = folder / "metadata"
    if not file.is_file():
        return None
    with reading(file, "a video's metadata"):
        K = np.array(json.loads(file.read_text(encoding="utf-8"))["K"], float).reshape(3, 3).T
    return np.tile(np.float32([K[0, 0], K[1, 1], K[0, 2], K[1, 2]]), (num_frames, 1))


BUILDER = Builder(
    layout="<category>/scenes/<video>/rgb/*; optional: cam_poses.txt, metadata, depth/*, masks/*",
    paper="the whole video, if it has at least 24 frames",
    parts=parts,
    sequences=sequences,
    options={"min_frames": base.MIN_FRAMES._replace(default=24), **base.CAMERA_OPTIONS, **base.DEPTH_OPTIONS},
)

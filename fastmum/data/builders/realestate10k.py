"""RealEstate10K: chunks of video frames, with poses and intrinsics from the clips' text files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.cameras import by_name, image_size, read_table
from fastmum.data.manifest import SequenceRecord


def parts(root: Path, options: Options) -> list[str]:
    """Clips of the training split."""
    return base.folders_in(root / "train")


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The clip in chunks; released: whole."""
    folder, cameras = root / "train" / part, root / "train" / f"{part}.txt"
    names = base.images_in(folder)
    poses = intrinsics = None
    if options.poses and names and cameras.is_file():
        poses, intrinsics = _read_clip(cameras, names, image_size(folder, names))
    scene = SequenceRecord(part, [f"train/{part}/{name}" for name in names], poses, intrinsics)
    yield from base.chunks(scene, options, released=None)


def _read_clip(file: Path, names: list[str], size: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Poses and intrinsics of frames that are named after their time stamps; NaN where the file has no line.

    After the clip's address, one line per frame: time stamp, fx fy cx cy as fractions of width and height, two zeros,
    upper 3 x 4 of camera_from_world, OpenCV axes (the data set's web page).
    """
    lines = {int(line[0]): line for line in read_table(file, 19, "a RealEstate10K clip", skip=1)}
    stems = {name: name.partition(".")[0] for name in names}
    found = {name: lines[int(stem)] for name, stem in stems.items() if stem.isdecimal() and int(stem) in lines}
    poses = by_name(names, {name: np.vstack([line[7:].reshape(3, 4), [0, 0, 0, 1]]) for name, line in found.items()})
    if size is None:
        return poses, None
    return poses, by_name(names, {name: line[1:5] * np.tile(size, 2) for name, line in found.items()}, (4,))


BUILDER = Builder(
    layout="train/<clip>/*.png; optional: train/<clip>.txt",
    paper=base.CHUNK_RULE,
    released="the whole clip",
    parts=parts,
    sequences=sequences,
    options=base.CHUNK_OPTIONS | base.CAMERA_OPTIONS,
)

"""RealEstate10K: chunks of video frames, with poses and intrinsics where the clips' text files are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.cameras import image_size, read_table
from fastmum.data.builders.listing import folders_in, images_in
from fastmum.data.builders.scene import CHUNK_OPTIONS, CHUNK_RULE, POSES, chunks
from fastmum.data.manifest import SequenceRecord


def parts(root: Path, options: Options) -> list[str]:
    """Clips of the training split."""
    return folders_in(root / "train")


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The clip in chunks; released: whole."""
    folder, cameras = root / "train" / part, root / "train" / f"{part}.txt"
    names = images_in(folder)
    poses = intrinsics = None
    if options.poses and names and cameras.is_file():
        poses, intrinsics = read_clip(cameras, names, image_size(folder, names))
    scene = SequenceRecord(part, [f"train/{part}/{name}" for name in names], poses, intrinsics)
    yield from chunks(scene, options, released=None)


def read_clip(file: Path, names: list[str], size: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Poses and intrinsics of a clip's frames, which are named after their time stamps; NaN where it has no line.

    After the clip's address a line a frame: time stamp, fx fy cx cy as shares of width and height, two zeros, and the
    upper 3 x 4 of world-to-camera, OpenCV axes (the data set's web page).
    """
    lines = read_table(file, 19, "a RealEstate10K clip", skip=1)
    line_of = {int(stamp): i for i, stamp in enumerate(lines[:, 0])}
    poses = np.full((len(names), 4, 4), np.nan, np.float32)
    focal = np.full((len(names), 4), np.nan, np.float32)
    for i, name in enumerate(names):
        stem = name.partition(".")[0]
        line = line_of.get(int(stem)) if stem.isdecimal() else None
        if line is not None:
            poses[i] = np.vstack([lines[line, 7:].reshape(3, 4), [0, 0, 0, 1]])
            focal[i] = lines[line, 1:5] * np.tile(size or (np.nan, np.nan), 2)
    return poses, None if size is None else focal


BUILDER = Builder(
    layout="train/<clip>/*.png, and train/<clip>.txt if poses are wanted",
    paper=CHUNK_RULE,
    released="the whole clip",
    parts=parts,
    sequences=sequences,
    options=CHUNK_OPTIONS | {"poses": POSES},
)

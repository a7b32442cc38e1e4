"""BlendedMVS: chunks of a scene's blended images, with poses and intrinsics where they are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.cameras import reading
from fastmum.data.builders.listing import folders_in, images_in
from fastmum.data.builders.scene import CHUNK_OPTIONS, CHUNK_RULE, POSES, chunks
from fastmum.data.manifest import SequenceRecord


def parts(root: Path, options: Options) -> list[str]:
    """Scenes."""
    return [scene for scene in folders_in(root) if (root / scene / "blended_images").is_dir()]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The images without a mask burnt in, in chunks; released: whole."""
    names = [name for name in images_in(root / part / "blended_images") if "_masked" not in name]
    poses = intrinsics = None
    if options.poses and names and (root / part / "cams").is_dir():
        cameras = [_camera(root / part / "cams" / f"{name.partition('.')[0]}_cam.txt") for name in names]
        poses, intrinsics = (np.array(values, np.float32) for values in zip(*cameras, strict=True))
    frames = [f"{part}/blended_images/{name}" for name in names]
    yield from chunks(SequenceRecord(part, frames, poses, intrinsics), options, released=None)


def _camera(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """DistContext-to-camera with OpenCV axes and fx fy cx cy of a camera file of MVSNet; NaN where there is no file."""
    if not file.is_file():
        return np.full((4, 4), np.nan), np.full(4, np.nan)
    with reading(file, "a camera of MVSNet"):
        words = file.read_text(encoding="utf-8").split()
        begin, middle = words.index("extrinsic") + 1, words.index("intrinsic") + 1
        pose = np.array(words[begin : begin + 16], float).reshape(4, 4)
        K = np.array(words[middle : middle + 9], float).reshape(3, 3)
    return pose, np.array([K[0, 0], K[1, 1], K[0, 2], K[1, 2]])


BUILDER = Builder(
    layout="<scene>/blended_images/*.jpg, and <scene>/cams/*_cam.txt if poses are wanted",
    paper=f"images without _masked, {CHUNK_RULE}",
    released="the whole scene",
    parts=parts,
    sequences=sequences,
    options=CHUNK_OPTIONS | {"poses": POSES},
)

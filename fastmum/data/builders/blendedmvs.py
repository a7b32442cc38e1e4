"""BlendedMVS: chunks of the blended images of a scene, with poses, intrinsics and depth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.cameras import reading
from fastmum.data.depth import DepthFormat
from fastmum.data.manifest import SequenceRecord

DEPTH = DepthFormat("pfm")  # z in the unit of the reconstruction, 0 where the mesh has a hole (MVSNet's format)


def parts(root: Path, options: Options) -> list[str]:
    """Scenes."""
    return [scene for scene in base.folders_in(root) if (root / scene / "blended_images").is_dir()]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The images without a blended mask, in chunks; released: whole."""
    names = [name for name in base.images_in(root / part / "blended_images") if "_masked" not in name]
    stems = [name.partition(".")[0] for name in names]
    scene = SequenceRecord(part, [f"{part}/blended_images/{name}" for name in names])
    if options.poses and names and (root / part / "cams").is_dir():
        cameras = [_camera(root / part / "cams" / f"{stem}_cam.txt") for stem in stems]
        poses, intrinsics = (np.array(values, np.float32) for values in zip(*cameras, strict=True))
        scene = scene._replace(poses=poses, intrinsics=intrinsics)
    if options.depth:
        depths = base.existing(root, [f"{part}/rendered_depth_maps/{stem}.pfm" for stem in stems])
        scene = scene._replace(depths=depths, depth_format=DEPTH)
    yield from base.chunks(scene, options, released=None)


def _camera(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """camera_from_world and fx fy cx cy from a camera file of MVSNet; NaN if there is no file."""
    if not file.is_file():
        return np.full((4, 4), np.nan), np.full(4, np.nan)
    with reading(file, "a camera of MVSNet"):
        words = file.read_text(encoding="utf-8").split()
        begin, middle = words.index("extrinsic") + 1, words.index("intrinsic") + 1
        pose = np.array(words[begin : begin + 16], float).reshape(4, 4)
        K = np.array(words[middle : middle + 9], float).reshape(3, 3)
    return pose, np.array([K[0, 0], K[1, 1], K[0, 2], K[1, 2]])


BUILDER = Builder(
    layout="<scene>/blended_images/*.jpg; optional: <scene>/cams/*_cam.txt, rendered_depth_maps/*.pfm",
    paper=f"images without _masked, {base.CHUNK_RULE}",
    released="the whole scene",
    parts=parts,
    sequences=sequences,
    options=base.CHUNK_OPTIONS | base.CAMERA_OPTIONS | base.DEPTH_OPTIONS,
)

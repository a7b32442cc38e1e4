"""DL3DV-10K: whole scenes, with poses and intrinsics from transforms.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Option, Options
from fastmum.data.builders.cameras import image_size, read_nerfstudio
from fastmum.data.manifest import SequenceRecord


def parts(root: Path, options: Options) -> list[str]:
    """Scenes, `1K/<hash>`."""
    folders = base.folders_in(root)
    return [f"{folder}/{scene}" for folder in folders for scene in base.folders_in(root / folder)]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The whole scene."""
    folder, cameras = root / part / options.images, root / part / "transforms.json"
    names = [name for name in base.images_in(folder) if name.startswith("frame_")]
    poses = intrinsics = None
    if names and options.poses and cameras.is_file():
        poses, intrinsics = read_nerfstudio(cameras, names, image_size(folder, names))
    frames = [f"{part}/{options.images}/{name}" for name in names]
    yield from base.whole(SequenceRecord(part, frames, poses, intrinsics), options)


BUILDER = Builder(
    layout="<xK>/<scene>/images_8/frame_*.png; optional: transforms.json",
    paper="the whole scene",
    parts=parts,
    sequences=sequences,
    options={
        "images": Option("images_8", "folder of a scene's images"),
        "min_frames": base.MIN_FRAMES,
        **base.CAMERA_OPTIONS,
    },
)

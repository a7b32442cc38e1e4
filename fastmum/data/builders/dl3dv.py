"""DL3DV-10K: whole scenes, with poses from transforms.json where that is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastmum.data.builders.base import Builder, Option, Options
from fastmum.data.builders.cameras import image_size, read_nerfstudio
from fastmum.data.builders.listing import folders_in, images_in
from fastmum.data.builders.scene import MIN_FRAMES, POSES, whole
from fastmum.data.manifest import SequenceRecord


def parts(root: Path, options: Options) -> list[str]:
    """Scenes, `1K/<hash>`."""
    return [f"{thousand}/{scene}" for thousand in folders_in(root) for scene in folders_in(root / thousand)]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The whole scene."""
    folder, cameras = root / part / options.images, root / part / "transforms.json"
    names = [name for name in images_in(folder) if name.startswith("frame_")]
    poses = intrinsics = None
    if names and options.poses and cameras.is_file():
        poses, intrinsics = read_nerfstudio(cameras, names, image_size(folder, names))
    yield from whole(SequenceRecord(part, [f"{part}/{options.images}/{n}" for n in names], poses, intrinsics), options)


BUILDER = Builder(
    layout="<xK>/<scene>/images_8/frame_*.png, and transforms.json if poses are wanted",
    paper="the whole scene",
    parts=parts,
    sequences=sequences,
    options={
        "images": Option("images_8", "folder of a scene's images"),
        "min_frames": MIN_FRAMES,
        "poses": POSES,
    },
)

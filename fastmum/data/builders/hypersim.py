"""Hypersim: whole scenes, all cameras together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.listing import folders_in, images_in
from fastmum.data.builders.scene import MIN_FRAMES, whole
from fastmum.data.manifest import SequenceRecord

PREFIX, SUFFIX = "scene_cam_", "_final_preview"


def parts(root: Path, options: Options) -> list[str]:
    """Scenes, `ai_001_001`."""
    return [scene for scene in folders_in(root) if (root / scene / "images").is_dir()]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The whole scene, camera by camera; released: the first camera alone.

    A folder may hold several renderings of a frame (`frame.0000.color.jpg`, `.tonemap.jpg`, ...): the paper's rule
    takes the tone-mapped ones where there are any, so that no two frames are the same view.
    """
    frames: list[str] = []
    for folder in folders_in(root / part / "images"):
        camera = folder.removeprefix(PREFIX).removesuffix(SUFFIX)
        if folder != PREFIX + camera + SUFFIX or (options.rule == "released" and camera != "00"):
            continue
        names = [name for name in images_in(root / part / "images" / folder) if name.lower().endswith(".jpg")]
        if options.rule == "paper":
            names = [name for name in names if name.endswith(".tonemap.jpg")] or names
        frames += [f"{part}/images/{folder}/{name}" for name in names]
    yield from whole(SequenceRecord(part, frames), options)


BUILDER = Builder(
    layout="<scene>/images/scene_cam_*_final_preview/*.jpg",
    paper="the whole scene, all its cameras in one sequence",
    released="camera 00 alone",
    parts=parts,
    sequences=sequences,
    options={"min_frames": MIN_FRAMES},
)

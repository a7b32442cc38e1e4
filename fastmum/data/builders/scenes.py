"""Rendered scenes (`python -m fastmum.scenes`): whole scenes, with exact poses, intrinsics and depth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.cameras import reading
from fastmum.data.depth import DepthFormat
from fastmum.data.manifest import SequenceRecord

CAMERAS = "cameras.json"


def parts(root: Path, options: Options) -> list[str]:
    """Scenes, `scene_0000`."""
    return [scene for scene in base.folders_in(root) if (root / scene / CAMERAS).is_file()]


def scene_record(root: Path, name: str) -> SequenceRecord:
    """All views of one scene. `cameras.json` describes the layout (fastmum/scenes/files.py).

    Raises:
        DataError: `cameras.json` cannot be read.
    """
    file = root / name / CAMERAS
    with reading(file, "cameras of a rendered scene"):
        content = json.loads(file.read_text(encoding="utf-8"))
        frames = content["frames"]
        K = np.array([frame["K"] for frame in frames], np.float32).reshape(-1, 3, 3)
        return SequenceRecord(
            name,
            [f"{name}/{frame['file']}" for frame in frames],
            np.array([frame["T_cam_world"] for frame in frames], np.float32).reshape(-1, 4, 4),
            K[:, [0, 1, 0, 1], [0, 1, 2, 2]],
            depths=base.existing(root, [f"{name}/{frame['depth']}" for frame in frames]),
            depth_format=DepthFormat("png16", unit=float(content["depth_unit"])),  # z in metres, 0 is the sky
        )


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The whole scene."""
    yield from base.whole(scene_record(root, part), options)


BUILDER = Builder(
    layout="scene_*/{cameras.json,*.png,depth/*.png}",
    paper="the whole scene",
    parts=parts,
    sequences=sequences,
    options={"min_frames": base.MIN_FRAMES},
)

"""Data sets that come with lists of pairs: MegaDepth's scene information of DKM and RoMa."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Options
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import reading
from fastmum.data.manifest import SequenceRecord
from fastmum.data.scene_info import FOLDER, SCENE_INFO, images_of, read_scene, scene_file

# RoMa's training leaves out LoFTR's test scenes, scenes that LoFTR ignores, and those of the Image Matching Challenge.
LEFT_OUT = frozenset(
    {
        "0015", "0022", "0121", "0133", "0168", "0178", "0229", "0349", "0412", "0430", "0443", "1001", "5014", "5015",
        "5016", "0008", "0019", "0021", "0024", "0025", "0032", "0063", "1589",
    }
)  # fmt: skip


def scenes(root: Path, options: Options) -> list[str]:
    """The scenes of the folder that RoMa trains on, without those of `--exclude`."""
    names = [name.removesuffix(".npy") for name in base.names_in(root / FOLDER) if name.endswith(".npy")]
    return base.without_excluded(sorted(set(names) - LEFT_OUT), options)


def scene(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The images of a scene that have depth."""
    file = scene_file(root, part)
    content = read_scene(file)
    with reading(file, "scene information"):
        numbers = images_of(content)
        frames, depths = ([str(content[key][i]) for i in numbers] for key in ("image_paths", "depth_paths"))
        poses = np.stack([np.asarray(content["poses"][i], np.float32).reshape(4, 4) for i in numbers]).reshape(-1, 4, 4)
        K = np.stack([np.asarray(content["intrinsics"][i], np.float64).reshape(3, 3) for i in numbers])
        intrinsics = K[:, [0, 1, 0, 1], [0, 1, 2, 2]].astype(np.float32)
        record = SequenceRecord(part, frames, poses, intrinsics, depths=depths, depth_format=DepthFormat("hdf5"))
    yield from base.whole(record, options)


BUILDERS = {
    SCENE_INFO: Builder(
        layout=f"{FOLDER}/<scene>.npy and the images and depth maps that they name (DKM, RoMa)",
        paper="all images of a scene; pairs and overlaps are read from its file",
        parts=scenes,
        sequences=scene,
        options=base.MIN_FRAMES | base.EXCLUDE,
    ),
}

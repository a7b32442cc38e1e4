"""Any COLMAP models below a folder, chained by either rule of the paper, with the depth maps of dense workspaces."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import natsort

from fastmum.data.builders import reconstruction
from fastmum.data.builders.base import DEPTH_OPTIONS, Builder, Option, Options
from fastmum.data.colmap import Model
from fastmum.data.depth import DepthFormat
from fastmum.data.manifest import SequenceRecord

log = logging.getLogger(__name__)

FORMAT = DepthFormat("colmap")  # z in the unit of the reconstruction, 0 where unknown


def parts(root: Path, options: Options) -> list[str]:
    """Folders at or below the root that hold an images.bin or images.txt, '.' for the root itself."""
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        name = Path(folder).relative_to(root).as_posix()
        if {"images.bin", "images.txt"} & set(files) and fnmatchcase(name, options.models):
            found.append(name)
    return reconstruction.whole_models(root, natsort.natsorted(found), options)


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The chains of a model; none if its images are not found, which is logged."""
    model = reconstruction.load(root / part, options)
    images = _images_of(model, root, part, options) if model else None
    if model is None or images is None:
        return
    maps = PurePosixPath(images).parent / "stereo/depth_maps"  # of `colmap image_undistorter`'s workspace
    depths = reconstruction.Depths(FORMAT, lambda name: f"{maps}/{name}.geometric.bin")
    chained = reconstruction.angle_sequences if options.chain == "angle" else reconstruction.overlap_sequences
    yield from chained(root, root.name if part == "." else part, images, model, options, depths)


def _images_of(model: Model, root: Path, part: str, options: Options) -> str | None:
    # The first folder of that name, from the model's folder upwards, that contains any of its images.
    folder = PurePosixPath(part)
    for parent in (folder, *folder.parents):
        for candidate in (parent / options.images, parent):
            if any((root / candidate / name).is_file() for name in model.names):
                return candidate.as_posix()
    log.warning(
        "skipped: no image of the COLMAP model in '%s' is in a folder '%s' next to or above it; name it with --images",
        root / part, options.images,
    )  # fmt: skip
    return None


BUILDER = Builder(
    layout="any COLMAP models, binary or text, each with a folder of its images next to or above it; "
    "optional: stereo/depth_maps next to the images",
    paper="--chain overlap: as megadepth; --chain angle: as megascenes",
    released="--chain overlap: as megadepth; --chain angle: as megascenes",
    parts=parts,
    sequences=sequences,
    begin=reconstruction.begin,
    options={
        "chain": Option("overlap", "the rule that forms sequences", choices=("overlap", "angle")),
        "images": Option("images", "folder of the images, relative to the model's folder or one above it"),
        "models": Option("*", "pattern of the models' folders, such as '*/sparse/0'"),
        "min_frames": Option(None, "skip shorter sequences (default 2; angle 24, released 12)", type=int, min=1),
        **reconstruction.OVERLAP_OPTIONS,
        **reconstruction.ANGLE_OPTIONS,
        **reconstruction.COMMON_OPTIONS,
        **DEPTH_OPTIONS,
    },
)

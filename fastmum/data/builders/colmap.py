"""Any COLMAP models below a folder, chained by either rule of the paper."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import natsort

from fastmum.data.builders import reconstruction
from fastmum.data.builders.base import Builder, Option, Options
from fastmum.data.colmap import Model
from fastmum.data.manifest import SequenceRecord

log = logging.getLogger(__name__)


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
    """The chains of a model; none where its images are not found, which is logged."""
    model = reconstruction.load(root / part, options)
    images = _images_of(model, root, part, options) if model else None
    if images is None:
        return
    present = reconstruction.on_disk(model, root / images)
    chained = reconstruction.angle_sequences if options.chain == "angle" else reconstruction.overlap_sequences
    yield from chained(root.name if part == "." else part, images, model, present, options)


def _images_of(model: Model, root: Path, part: str, options: Options) -> str | None:
    # The nearest folder of that name, seen from the model upwards, that holds any of its images.
    part = PurePosixPath(part)
    for folder in (part, *part.parents):
        for candidate in (folder / options.images, folder):
            if any((root / candidate / name).is_file() for name in model.names):
                return candidate.as_posix()
    log.warning(
        "left out: no image of the COLMAP model in '%s' is in a folder '%s' beside or above it; name it with --images",
        root / part, options.images,
    )  # fmt: skip
    return None


BUILDER = Builder(
    layout="any COLMAP models, binary or text, each with a folder of its images beside or above it",
    paper="--chain overlap: as megadepth; --chain angle: as megascenes",
    released="--chain overlap: as megadepth; --chain angle: as megascenes",
    parts=parts,
    sequences=sequences,
    begin=reconstruction.begin,
    options={
        "chain": Option("overlap", "the rule that forms sequences", choices=("overlap", "angle")),
        "images": Option("images", "folder of the images, seen from the model's folder or one above it"),
        "models": Option("*", "pattern that the folders of models must match, such as '*/sparse/0'"),
        "min_frames": Option(None, "shorter ones are left out (default 2; angle 24, released 12)", kind=int, least=1),
        **reconstruction.OVERLAP_OPTIONS,
        **reconstruction.ANGLE_OPTIONS,
        **reconstruction.COMMON_OPTIONS,
    },
)

"""Any folders of images: every folder that contains images is a sequence, in natural order."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import natsort

from fastmum.data.builders.base import Builder, Option, Options, images_in, is_image
from fastmum.data.manifest import SequenceRecord

log = logging.getLogger(__name__)

# Folders next to a scene's photographs that hold something else.
OTHER_FOLDERS = frozenset({"depth", "depths", "mask", "masks", "normal", "normals"})


def image_folders(root: Path) -> list[str]:
    """Every folder at or below the root that contains images, '.' for the root itself.

    Hidden folders and those named after depth, masks or normals are skipped; the latter are logged.
    """
    found, skipped = [], 0
    for folder, subfolders, files in os.walk(root, followlinks=True):
        other = [name for name in subfolders if name.lower() in OTHER_FOLDERS]
        skipped += len(other)
        subfolders[:] = natsort.natsorted(n for n in subfolders if n not in other and not n.startswith("."))
        if any(map(is_image, files)):
            found.append(Path(folder).relative_to(root).as_posix())
    if skipped:
        log.info("skipped %d folders of depth, masks or normals under %s", skipped, root)
    return found


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The folder as a sequence, or each of its images as one."""
    prefix = "" if part == "." else f"{part}/"
    frames = [prefix + name for name in images_in(root / part)]
    if options.single:
        yield from (SequenceRecord(frame, [frame]) for frame in frames)
    elif len(frames) >= options.min_frames:
        yield SequenceRecord(root.resolve().name if part == "." else part, frames)


BUILDERS = {
    "folder": Builder(
        layout="any folders of images; depth, mask and normal folders are skipped",
        paper="every folder with images is a sequence, in natural order",
        parts=lambda root, options: image_folders(root),
        sequences=sequences,
        options={
            "min_frames": Option(1, "skip shorter sequences", min=1),
            "single": Option(False, "every image is a sequence"),
        },
    )
}

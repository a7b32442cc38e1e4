"""Shared by the data sets that are COLMAP models: options, loading, and chains of images as sequences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from fastmum.data.builders.base import CAMERA_OPTIONS, Option, Options, existing
from fastmum.data.builders.cameras import upright
from fastmum.data.colmap import Model, find_format, import_pycolmap, read_model
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord
from fastmum.data.rules import chains
from fastmum.data.rules.overlap import Overlap, count_shared

log = logging.getLogger(__name__)

T = TypeVar("T")

SHORTEST = 2  # images of a chain of overlap: the fewest views that are sampled (supplement A, "Sampling")
RELEASED_MIN_IMAGES = 12  # of a MegaScenes model, in the released script

COMMON_OPTIONS = CAMERA_OPTIONS | {
    "broken": Option("stop", "at a model that cannot be read", choices=("stop", "skip")),
}
OVERLAP_OPTIONS = {
    "sequences": Option(chains.CHAINS_PER_SCENE, "sequences drawn per scene", min=1),
    "length": Option(chains.CHAIN_LENGTH, "most images of a sequence", min=2),
}
ANGLE_OPTIONS = {
    "min_overlap": Option(chains.MIN_OVERLAP, "least overlap of consecutive images", min=0),
    "min_angle": Option(chains.MIN_ANGLE, "least rotation between consecutive images, in degrees", min=0),
}


class Depths(NamedTuple):
    """Depth maps of a model's images: format, path below the root of an image's map, smallest size of the file."""

    format: DepthFormat
    path: Callable[[str], str]
    min_bytes: int = 0


def begin(root: Path, options: Options) -> None:
    """Check that pycolmap is installed before anything is read."""
    import_pycolmap()


def whole_models(root: Path, parts: Iterable[str], options: Options) -> list[str]:
    """The parts that hold a complete model, by their file names only, so that errors come before hours of work.

    Raises:
        DataError: one lacks files, unless `--broken skip`.
    """
    return [part for part in parts if _unless_broken(find_format, root / part, options)]


def load(folder: Path, options: Options) -> Model | None:
    """The model in a folder; None if it is broken and `--broken skip` is given.

    Raises:
        DataError: it cannot be read.
    """
    return _unless_broken(read_model, folder, options)


def _unless_broken(read: Callable[[Path], T], folder: Path, options: Options) -> T | None:
    try:
        return read(folder)
    except DataError as error:
        if options.broken == "stop":
            raise DataError(f"{error} (--broken skip skips such models)") from error
        log.warning("skipped: %s", error)
        return None


def overlap_sequences(
    root: Path, part: str, images: str, model: Model, options: Options, depths: Depths | None = None
) -> Iterator[SequenceRecord]:
    """MegaDepth's rule, or what the released script does instead."""
    present = _present(root, images, model)
    rng = options.rng(part)
    if options.rule == "released":
        found = chains.nearest_of_anchor(_overlap(model), rng, options.sequences, options.length, present)
    else:
        model = model.select(present)
        found = chains.overlap_chains(_overlap(model), rng, options.sequences, options.length)
        found = [chain for chain in found if len(chain) >= (options.min_frames or SHORTEST)]
    yield from _records(root, part, images, model, found, options, depths)


def angle_sequences(
    root: Path, part: str, images: str, model: Model, options: Options, depths: Depths | None = None
) -> Iterator[SequenceRecord]:
    """MegaScenes' rule. The released script never calls it: its sequences are whole models."""
    model = model.select(_present(root, images, model))
    if options.rule == "released":
        whole = len(model.names) >= (options.min_frames or RELEASED_MIN_IMAGES)
        found = [np.arange(len(model.names))] if whole else []
    else:
        found = chains.angle_chains(
            _overlap(model),
            model.poses[:, :3, :3],
            options.min_frames or chains.MIN_VIEWS,
            options.min_overlap,
            options.min_angle,
        )
    yield from _records(root, part, images, model, found, options, depths)


def _present(root: Path, images: str, model: Model) -> np.ndarray:
    """Whether the file of each image exists, (n,) bool."""
    paths = existing(root, _paths(images, model)) or [""] * len(model.names)
    present = np.array([bool(path) for path in paths])
    if not present.all():
        log.warning("%d of %d images of the COLMAP model are not in %s", (~present).sum(), len(present), root / images)
    return present


def _paths(images: str, model: Model) -> list[str]:
    return [name if images == "." else f"{images}/{name}" for name in model.names]


def _overlap(model: Model) -> Overlap:
    return count_shared(model.images, model.points, len(model.names))


def _records(
    root: Path,
    part: str,
    images: str,
    model: Model,
    found: list[np.ndarray],
    options: Options,
    depths: Depths | None,
) -> Iterator[SequenceRecord]:
    scene = SequenceRecord(part, _paths(images, model))
    if depths is not None and not options.depth:
        depths = None
    turned = np.zeros(len(model.names), bool)
    if options.poses or depths:
        # COLMAP ignores the EXIF orientation (its issue 2104), decoders do not.
        poses, intrinsics = model.poses.astype(np.float32), model.intrinsics.astype(np.float32)
        for i in np.unique(np.concatenate(found)) if found else ():
            poses[i], intrinsics[i], turned[i] = upright(root / scene.frames[i], poses[i], intrinsics[i])
        if options.poses:
            scene = scene._replace(poses=poses, intrinsics=intrinsics)
    if depths is not None:
        # Maps of turned images are left out: they lie as the image is stored.
        paths = existing(root, ["" if t else depths.path(n) for t, n in zip(turned, model.names, strict=True)])
        if paths is not None and depths.min_bytes:
            paths = [p if p and (root / p).stat().st_size >= depths.min_bytes else "" for p in paths]
        scene = scene._replace(depths=paths, depth_format=depths.format)
    for number, rows in enumerate(found):
        yield scene.select(rows, f"{part}/{number:03d}")

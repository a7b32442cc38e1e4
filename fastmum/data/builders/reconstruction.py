"""What the data sets that are COLMAP models share: options, which images are on disk, and chains as sequences."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastmum.data.builders.base import Option, Options
from fastmum.data.colmap import Model, find_format, import_pycolmap, read_model
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord
from fastmum.data.rules import chains
from fastmum.data.rules.overlap import Overlap, count_shared

log = logging.getLogger(__name__)

Found = TypeVar("Found")

SHORTEST = 2  # images of a chain of overlap: the fewest views that are sampled (supplement A, "Sampling")
RELEASED_MIN_IMAGES = 12  # of a MegaScenes model, in the released script

COMMON_OPTIONS = {
    "poses": Option(True, "write poses and intrinsics, 64 bytes a frame"),
    "broken": Option("stop", "what to do about a model that cannot be read", choices=("stop", "skip")),
}
OVERLAP_OPTIONS = {
    "sequences": Option(chains.CHAINS_PER_SCENE, "sequences drawn in a scene", least=1),
    "length": Option(chains.CHAIN_LENGTH, "most images of a sequence", least=2),
}
ANGLE_OPTIONS = {
    "min_overlap": Option(chains.MIN_OVERLAP, "least overlap of one image and the next", least=0),
    "min_angle": Option(chains.MIN_ANGLE, "least turn of the camera from one image to the next, in degrees", least=0),
}


def begin(root: Path, options: Options) -> None:
    """Look for pycolmap before anything is read.

    Raises:
        DataError: it is not installed.
    """
    import_pycolmap()


def whole_models(root: Path, parts: Iterable[str], options: Options) -> list[str]:
    """Those parts that hold a whole model, asked of the file system alone, so that it is known before work is lost.

    Raises:
        DataError: one lacks files, unless `--broken skip`.
    """
    return [part for part in parts if _unless_broken(find_format, root / part, options)]


def load(folder: Path, options: Options) -> Model | None:
    """The model in a folder; None for one that is broken with `--broken skip`.

    Raises:
        DataError: it cannot be read.
    """
    return _unless_broken(read_model, folder, options)


def on_disk(model: Model, folder: Path) -> np.ndarray:
    """Which images of a model are files below a folder: (n,) bool. Every folder is listed once."""
    listed: dict[str, frozenset[str]] = {}
    present = np.zeros(len(model.names), bool)
    for i, name in enumerate(model.names):
        inner, _, file = name.rpartition("/")
        if inner not in listed:
            listed[inner] = _listing(folder / inner)
        present[i] = file in listed[inner]
    if not present.all():
        log.warning("%d of %d images of the COLMAP model are not in %s", (~present).sum(), len(present), folder)
    return present


def overlap_sequences(
    part: str, prefix: str, model: Model, present: np.ndarray, options: Options
) -> Iterator[SequenceRecord]:
    """MegaDepth's rule, or what the released script does in its place."""
    rng = options.rng(part)
    if options.rule == "released":
        found = chains.nearest_of_anchor(_overlap(model), rng, options.sequences, options.length, present)
    else:
        model = model.select(present)
        found = chains.overlap_chains(_overlap(model), rng, options.sequences, options.length)
        found = [chain for chain in found if len(chain) >= (options.min_frames or SHORTEST)]
    yield from _records(part, prefix, model, found, options)


def angle_sequences(
    part: str, prefix: str, model: Model, present: np.ndarray, options: Options
) -> Iterator[SequenceRecord]:
    """MegaScenes' rule. The released script never calls it: its sequences are whole models."""
    model = model.select(present)
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
    yield from _records(part, prefix, model, found, options)


def _overlap(model: Model) -> Overlap:
    return count_shared(model.images, model.points, len(model.names))


def _records(
    part: str, prefix: str, model: Model, found: list[np.ndarray], options: Options
) -> Iterator[SequenceRecord]:
    frames = [name if prefix == "." else f"{prefix}/{name}" for name in model.names]
    poses = model.poses.astype(np.float32) if options.poses else None
    intrinsics = model.intrinsics.astype(np.float32) if options.poses else None
    for number, images in enumerate(found):
        yield SequenceRecord(
            f"{part}/{number:03d}",
            [frames[i] for i in images],
            None if poses is None else poses[images],
            None if intrinsics is None else intrinsics[images],
        )


def _unless_broken(read: Callable[[Path], Found], folder: Path, options: Options) -> Found | None:
    try:
        return read(folder)
    except DataError as error:
        if options.broken == "stop":
            raise DataError(f"{error} (--broken skip leaves such models out)") from error
        log.warning("left out: %s", error)
        return None


def _listing(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()

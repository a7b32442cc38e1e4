"""MegaDepth, undistorted as D2-Net does it: a COLMAP model a scene, as text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from fastmum.data.builders import reconstruction
from fastmum.data.builders.base import Builder, Option, Options
from fastmum.data.builders.listing import folders_in
from fastmum.data.manifest import SequenceRecord

log = logging.getLogger(__name__)

SCENES = "Undistorted_SfM"
MODEL = "sparse-txt"


def parts(root: Path, options: Options) -> list[str]:
    """Scenes that were undistorted, but for those left out with `--exclude`."""
    there = folders_in(root / SCENES)
    excluded = {scene.strip() for scene in options.exclude.split(",")} - {""}
    if unknown := sorted(excluded.difference(there)):
        log.warning("--exclude names scenes that are not there: %s", ", ".join(unknown))
    scenes = [f"{SCENES}/{scene}" for scene in there if scene not in excluded]
    undistorted = [scene for scene in scenes if (root / scene / MODEL).is_dir()]
    if len(undistorted) < len(scenes):
        log.warning("%d scenes have no folder %s and are left out", len(scenes) - len(undistorted), MODEL)
    models = reconstruction.whole_models(root, [f"{scene}/{MODEL}" for scene in undistorted], options)
    return [Path(model).parent.name for model in models]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The chains of a scene."""
    images = f"{SCENES}/{part}/images"
    model = reconstruction.load(root / SCENES / part / MODEL, options)
    if model is not None:
        present = reconstruction.on_disk(model, root / images)
        yield from reconstruction.overlap_sequences(part, images, model, present, options)


BUILDER = Builder(
    layout=f"{SCENES}/<scene>/{{images,{MODEL}}}",
    paper="1,000 sequences a scene: a random anchor, then on to the image of most overlap with the last",
    released="a random anchor and its 255 images of most overlap, be it 0",
    parts=parts,
    sequences=sequences,
    begin=reconstruction.begin,
    options={
        **reconstruction.OVERLAP_OPTIONS,
        "min_frames": Option(reconstruction.SHORTEST, "shorter sequences are left out", least=1),
        "exclude": Option("", "scenes to leave out, with commas between; 0015,0022 are those of MegaDepth-1500"),
        **reconstruction.COMMON_OPTIONS,
    },
)

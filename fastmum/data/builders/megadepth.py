"""MegaDepth, undistorted as in D2-Net: one COLMAP model per scene, as text, and MegaDepth's depth maps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from fastmum.data.builders import reconstruction
from fastmum.data.builders.base import DEPTH_OPTIONS, Builder, Option, Options, folders_in
from fastmum.data.depth import DepthFormat
from fastmum.data.manifest import SequenceRecord

log = logging.getLogger(__name__)

SCENES = "Undistorted_SfM"
MODEL = "sparse-txt"
DEPTHS = "phoenix/S6/zl548/MegaDepth_v1/{}/dense0/depths/{}.h5"
FORMAT = DepthFormat("hdf5")  # z in the unit of the reconstruction, 0 where unknown
# Smaller files hold a foreground mask (ordinal depth) instead of a map (D2-Net's preprocess_scene.py).
MIN_BYTES = 100 * 1024


def parts(root: Path, options: Options) -> list[str]:
    """Undistorted scenes without those of `--exclude`."""
    present = folders_in(root / SCENES)
    excluded = {scene.strip() for scene in options.exclude.split(",")} - {""}
    if unknown := sorted(excluded.difference(present)):
        log.warning("--exclude names scenes that do not exist: %s", ", ".join(unknown))
    scenes = [scene for scene in present if scene not in excluded]
    undistorted = [scene for scene in scenes if (root / SCENES / scene / MODEL).is_dir()]
    if len(undistorted) < len(scenes):
        log.warning("skipped %d scenes without a folder %s", len(scenes) - len(undistorted), MODEL)
    models = reconstruction.whole_models(root, [f"{SCENES}/{scene}/{MODEL}" for scene in undistorted], options)
    return [Path(model).parent.name for model in models]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The chains of a scene."""
    model = reconstruction.load(root / SCENES / part / MODEL, options)
    if model is not None:
        depths = reconstruction.Depths(FORMAT, lambda name: DEPTHS.format(part, name.rpartition(".")[0]), MIN_BYTES)
        yield from reconstruction.overlap_sequences(root, part, f"{SCENES}/{part}/images", model, options, depths)


BUILDER = Builder(
    layout=f"{SCENES}/<scene>/{{images,{MODEL}}}; optional: {DEPTHS.format('<scene>', '*')}",
    paper="1,000 sequences per scene: a random anchor, then always the image of most overlap with the last",
    released="a random anchor and its 255 images of most overlap, even if 0",
    parts=parts,
    sequences=sequences,
    begin=reconstruction.begin,
    options={
        **reconstruction.OVERLAP_OPTIONS,
        "min_frames": Option(reconstruction.SHORTEST, "skip shorter sequences", min=1),
        "exclude": Option("", "scenes to skip, separated by commas; 0015,0022 are those of MegaDepth-1500"),
        **reconstruction.COMMON_OPTIONS,
        **DEPTH_OPTIONS,
    },
)

"""MegaScenes: photographs from Wikimedia Commons and up to a dozen COLMAP models per scene.

A scene's number, six digits, is two folders: 001/234. The folder between the scene and its models is `colmap` in the
bucket and `sparses` in its documentation; any name is accepted. Models name their images relative to the scene's folder
of images: `commons/<category>/0/pictures/<file>`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastmum.data.builders import reconstruction
from fastmum.data.builders.base import Builder, Option, Options, folders_in
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord

MODELS, IMAGES = "reconstruct", "images"
DEPTH = 4  # folders from there to a model: 001/234/colmap/0


def begin(root: Path, options: Options) -> None:
    """Check for pycolmap and for zips that are still packed."""
    reconstruction.begin(root, options)
    for name in (MODELS, IMAGES):
        if not (root / name).is_dir() and (root / f"{name}.zip").is_file():
            raise DataError(f"'{root / name}.zip' must be unpacked first: unzip '{root / name}.zip' -d '{root}'")


def parts(root: Path, options: Options) -> list[str]:
    """Every model of every scene, such as 001/234/colmap/0."""
    folders = [MODELS]
    for _ in range(DEPTH):
        folders = [f"{folder}/{name}" for folder in folders for name in folders_in(root / folder)]
    return [model.removeprefix(f"{MODELS}/") for model in reconstruction.whole_models(root, folders, options)]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The chains of a model."""
    high, low, _, number = part.split("/")
    model = reconstruction.load(root / MODELS / part, options)
    if model is not None:
        name, images = f"{high}/{low}/{number}", f"{IMAGES}/{high}/{low}"
        yield from reconstruction.angle_sequences(root, name, images, model, options)


BUILDER = Builder(
    layout=f"{MODELS}/<001>/<234>/colmap/<n>/{{cameras,images,points3D}}.bin and {IMAGES}/<001>/<234>/, unpacked",
    paper="from the image that sees most points to the unused one of largest overlap x 4 cos(t) (1 - cos(t)), and so "
    "on; at least 24 images",
    released="every model of at least 12 images is a sequence: the chains are written, but never called",
    parts=parts,
    sequences=sequences,
    begin=begin,
    options={
        "min_frames": Option(None, "skip shorter sequences (default 24; released 12)", type=int, min=1),
        **reconstruction.ANGLE_OPTIONS,
        **reconstruction.COMMON_OPTIONS,
    },
)

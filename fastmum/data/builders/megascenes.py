"""MegaScenes: photographs from Wikimedia Commons and up to a dozen COLMAP models a scene.

A scene's number, six digits, is two folders: 001/234. The folder between the scene and its models is called `colmap` in
the bucket and `sparses` in its documentation; any name is taken. Models name their images from the scene's folder of
images on: `commons/<category>/0/pictures/<file>`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastmum.data.builders import reconstruction
from fastmum.data.builders.base import Builder, Option, Options
from fastmum.data.builders.listing import folders_in
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord

MODELS, IMAGES = "reconstruct", "images"
DEPTH = 4  # folders from there to a model: 001/234/colmap/0


def begin(root: Path, options: Options) -> None:
    """Look for pycolmap, and for archives that are still packed.

    Raises:
        DataError: no pycolmap, or a zip in the place of a folder.
    """
    reconstruction.begin(root, options)
    for name in (MODELS, IMAGES):
        if not (root / name).is_dir() and (root / f"{name}.zip").is_file():
            raise DataError(f"'{root / name}.zip' must be unpacked first: unzip '{root / name}.zip' -d '{root}'")


def parts(root: Path, options: Options) -> list[str]:
    """Every model of every scene, such as 001/234/colmap/0."""
    folders = [""]
    for _ in range(DEPTH):
        folders = [f"{folder}/{name}" for folder in folders for name in folders_in(root / MODELS / folder[1:])]
    found = [folder[1:] for folder in folders]
    models = reconstruction.whole_models(root, [f"{MODELS}/{folder}" for folder in found], options)
    return [model.removeprefix(f"{MODELS}/") for model in models]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The chains of a model."""
    high, low, _, number = part.split("/")
    images = f"{IMAGES}/{high}/{low}"
    model = reconstruction.load(root / MODELS / part, options)
    if model is not None:
        present = reconstruction.on_disk(model, root / images)
        yield from reconstruction.angle_sequences(f"{high}/{low}/{number}", images, model, present, options)


BUILDER = Builder(
    layout=f"{MODELS}/<001>/<234>/colmap/<n>/{{cameras,images,points3D}}.bin and {IMAGES}/<001>/<234>/, unpacked",
    paper="from the image that sees most points, on to the unused one of most overlap x 4 cos(t) (1 - cos(t)); "
    "at least 24 images",
    released="every model of at least 12 images is a sequence: the chains are written, but never called",
    parts=parts,
    sequences=sequences,
    begin=begin,
    options={
        "min_frames": Option(None, "shorter sequences are left out (default 24; released 12)", kind=int, least=1),
        **reconstruction.ANGLE_OPTIONS,
        **reconstruction.COMMON_OPTIONS,
    },
)

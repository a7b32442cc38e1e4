"""ScanNet++: chunks of the undistorted DSLR photographs of the training list, with poses where they are there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import natsort

from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.cameras import image_size, read_nerfstudio, reading
from fastmum.data.builders.listing import folders_in, images_in
from fastmum.data.builders.scene import CHUNK_OPTIONS, CHUNK_RULE, POSES, chunks
from fastmum.data.manifest import SequenceRecord
from fastmum.data.rules.chunks import CHUNK

IMAGES = "resized_undistorted_images"


def parts(root: Path, options: Options) -> list[str]:
    """Scenes with undistorted photographs."""
    return [scene for scene in folders_in(root) if (root / scene / "dslr" / IMAGES).is_dir()]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The training photographs that are there, in chunks."""
    dslr = root / part / "dslr"
    lists, cameras = dslr / "train_test_lists.json", dslr / "nerfstudio" / "transforms_undistorted.json"
    with reading(lists, "a scene's training list"):
        listed = set(json.loads(lists.read_text(encoding="utf-8"))["train"])
    names = natsort.natsorted(listed.intersection(images_in(dslr / IMAGES)))
    poses = intrinsics = None
    if options.poses and names and cameras.is_file():
        poses, intrinsics = read_nerfstudio(cameras, names, image_size(dslr / IMAGES, names))
    scene = SequenceRecord(part, [f"{part}/dslr/{IMAGES}/{name}" for name in names], poses, intrinsics)
    yield from chunks(scene, options, released=CHUNK)


BUILDER = Builder(
    layout=f"<scene>/dslr/{IMAGES}/*.JPG and <scene>/dslr/train_test_lists.json, "
    "and dslr/nerfstudio/transforms_undistorted.json if poses are wanted",
    paper=f"photographs of the training list, {CHUNK_RULE}",
    released=f"chunks of {CHUNK}, the last one takes the rest",
    parts=parts,
    sequences=sequences,
    options=CHUNK_OPTIONS | {"poses": POSES},
)

"""ScanNet++: chunks of the undistorted DSLR photographs of the training list, with poses, intrinsics and masks.

There is no depth for these photographs: the toolkit renders it for the fisheye originals.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import natsort

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.cameras import image_size, read_nerfstudio, reading
from fastmum.data.manifest import SequenceRecord

IMAGES, MASKS = "resized_undistorted_images", "resized_undistorted_masks"


def parts(root: Path, options: Options) -> list[str]:
    """Scenes with undistorted photographs."""
    return [scene for scene in base.folders_in(root) if (root / scene / "dslr" / IMAGES).is_dir()]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The existing photographs of the training list, in chunks."""
    dslr = root / part / "dslr"
    lists, cameras = dslr / "train_test_lists.json", dslr / "nerfstudio" / "transforms_undistorted.json"
    with reading(lists, "a scene's training list"):
        listed = set(json.loads(lists.read_text(encoding="utf-8"))["train"])
    names = natsort.natsorted(listed.intersection(base.images_in(dslr / IMAGES)))
    scene = SequenceRecord(part, [f"{part}/dslr/{IMAGES}/{name}" for name in names])
    if options.poses and names and cameras.is_file():
        poses, intrinsics = read_nerfstudio(cameras, names, image_size(dslr / IMAGES, names))
        scene = scene._replace(poses=poses, intrinsics=intrinsics)
    if options.depth:  # 0 where people were anonymised and outside the fisheye image
        masks = [f"{part}/dslr/{MASKS}/{name.rpartition('.')[0]}.png" for name in names]
        scene = scene._replace(masks=base.existing(root, masks))
    yield from base.chunks(scene, options, released=base.CHUNK)


BUILDER = Builder(
    layout=f"<scene>/dslr/{IMAGES}/*.JPG and <scene>/dslr/train_test_lists.json; "
    f"optional: dslr/nerfstudio/transforms_undistorted.json, dslr/{MASKS}",
    paper=f"photographs of the training list, {base.CHUNK_RULE}",
    released=f"chunks of {base.CHUNK}, the last one takes the rest",
    parts=parts,
    sequences=sequences,
    options=base.CHUNK_OPTIONS | base.CAMERA_OPTIONS | base.DEPTH_OPTIONS,
)

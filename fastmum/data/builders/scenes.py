"""Scenes in one folder each: DL3DV, 3DStreetView, RealEstate10K, BlendedMVS, ImageNet, rendered scenes, any folders."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Cameras, Option, Options
from fastmum.data.builders.cameras import by_name, from_K, image_size, read_nerfstudio, read_table, reading
from fastmum.data.depth import DepthFormat
from fastmum.data.manifest import SequenceRecord
from fastmum.data.splits import rendered_scene

STREETVIEW_RELEASED_CHUNK = 24


def blendedmvs(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The images without a blended mask, in chunks; released: whole."""
    names = [name for name in base.images_in(root / part / "blended_images") if "_masked" not in name]
    stems = [name.partition(".")[0] for name in names]
    frames = [f"{part}/blended_images/{name}" for name in names]
    depths = [f"{part}/rendered_depth_maps/{stem}.pfm" for stem in stems]
    z = DepthFormat("pfm")  # in the unit of the reconstruction, 0 where the mesh has a hole
    cameras = partial(mvsnet_cameras, root / part / "cams", stems)
    scene = base.make_scene(root, part, frames, options, cameras, depths, z)
    yield from base.chunks(scene, options, released=None)


def mvsnet_cameras(folder: Path, stems: list[str]) -> Cameras:
    """camera_from_world and fx fy cx cy from camera files of MVSNet; NaN for frames without a file."""
    poses, intrinsics = {}, {}
    for stem in stems:
        file = folder / f"{stem}_cam.txt"
        if file.is_file():
            with reading(file, "a camera of MVSNet"):
                words = file.read_text(encoding="utf-8-sig").split()
                begin, middle = words.index("extrinsic") + 1, words.index("intrinsic") + 1
                poses[stem] = np.array(words[begin : begin + 16], float).reshape(4, 4)
                intrinsics[stem] = from_K(np.array(words[middle : middle + 9], float).reshape(3, 3))
    return by_name(stems, poses), by_name(stems, intrinsics, (4,))


def dl3dv(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The whole scene."""
    folder = root / part / options.images
    names = [name for name in base.images_in(folder) if name.startswith("frame_")]
    frames = [f"{part}/{options.images}/{name}" for name in names]
    cameras = partial(read_nerfstudio, root / part / "transforms.json", names, folder)
    yield from base.whole(base.make_scene(root, part, frames, options, cameras), options)


def realestate10k(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The clip in chunks; released: whole."""
    names = base.images_in(root / part)
    cameras = partial(realestate10k_cameras, root / f"{part}.txt", names, root / part)
    clip = base.make_scene(root, part.rpartition("/")[2], [f"{part}/{name}" for name in names], options, cameras)
    yield from base.chunks(clip._replace(scene=_video_of_clip(root / f"{part}.txt")), options, released=None)


def _video_of_clip(file: Path) -> str | None:
    """The address of a clip's video, of which there may be several clips; None if it is unknown."""
    if not file.is_file():
        return None
    with reading(file, "a RealEstate10K clip"), file.open(encoding="utf-8") as lines:
        return lines.readline().strip() or None


def realestate10k_cameras(file: Path, names: list[str], images: Path) -> Cameras:
    """Poses and intrinsics of frames that are named after their time stamps; NaN where the file has no line.

    After the clip's address, one line per frame: time stamp, fx fy cx cy as fractions of width and height, two zeros,
    upper 3 x 4 of camera_from_world, OpenCV axes (the data set's web page).
    """
    if not file.is_file():
        return None, None
    lines = {int(line[0]): line for line in read_table(file, 19, "a RealEstate10K clip", skip=1)}
    stems = {name: name.partition(".")[0] for name in names}
    found = {name: lines[int(stem)] for name, stem in stems.items() if stem.isdecimal() and int(stem) in lines}
    poses = by_name(names, {name: np.vstack([line[7:].reshape(3, 4), [0, 0, 0, 1]]) for name, line in found.items()})
    if (size := image_size(images, names)) is None:
        return poses, None
    return poses, by_name(names, {name: line[1:5] * np.tile(size, 2) for name, line in found.items()}, (4,))


def streetview3d(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The folder of numbered photographs in chunks."""
    frames = [f"{part}/{name}" for name in base.images_in(root / part)]
    yield from base.chunks(SequenceRecord(part.rpartition("/")[2], frames), options, STREETVIEW_RELEASED_CHUNK)


def imagenet(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """Every image is a sequence."""
    for name in base.images_in(root / part):
        yield SequenceRecord(f"{part}/{name}", [f"{part}/{name}"])


def folder(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The folder as a sequence, or each of its images as one."""
    prefix = "" if part == "." else f"{part}/"
    frames = [prefix + name for name in base.images_in(root / part)]
    if options.single:
        yield from (SequenceRecord(frame, [frame]) for frame in frames)
    else:
        yield from base.whole(SequenceRecord(base.root_name(root) if part == "." else part, frames), options)


BUILDERS = {
    "dl3dv": Builder(
        layout="<xK>/<scene>/images_8/frame_*.png; optional: transforms.json",
        paper="the whole scene",
        parts=lambda root, options: base.matching_folders(root, "*/*"),
        sequences=dl3dv,
        options={"images": Option("images_8", "folder of a scene's images")} | base.MIN_FRAMES | base.POSES,
    ),
    "streetview3d": Builder(
        layout="dataset_aligned/<id>/*.jpg",
        paper=base.CHUNK_RULE,
        released=f"chunks of {STREETVIEW_RELEASED_CHUNK}, the last one takes the rest",
        parts=lambda root, options: base.matching_folders(root, "dataset_aligned/*"),
        sequences=streetview3d,
        options=base.CHUNKED,
    ),
    "realestate10k": Builder(
        layout="train/<clip>/*.png; optional: train/<clip>.txt",
        paper=base.CHUNK_RULE,
        released="the whole clip",
        parts=lambda root, options: base.matching_folders(root, "train/*"),
        sequences=realestate10k,
        options=base.CHUNKED | base.POSES,
    ),
    "blendedmvs": Builder(
        layout="<scene>/blended_images/*.jpg; optional: <scene>/cams/*_cam.txt, rendered_depth_maps/*.pfm",
        paper=f"images without _masked, {base.CHUNK_RULE}",
        released="the whole scene",
        parts=lambda root, options: base.matching_folders(root, "*", "blended_images"),
        sequences=blendedmvs,
        options=base.CHUNKED | base.POSES | base.DEPTH,
    ),
    "imagenet": Builder(
        layout="train/<class>/*.JPEG, or <class>/*.JPEG",
        paper="every image is a sequence",
        parts=lambda root, options: base.matching_folders(root, "train/*" if (root / "train").is_dir() else "*"),
        sequences=imagenet,
    ),
    "scenes": Builder(
        layout="scene_*/{cameras.json,*.png,depth/*.png}, as `python -m fastmum.scenes` renders them",
        paper="the whole scene",
        parts=lambda root, options: base.matching_folders(root, "*", "cameras.json"),
        sequences=lambda root, part, options: base.whole(rendered_scene(root, part), options),
        options=base.MIN_FRAMES,
    ),
    "folder": Builder(
        layout="any folders of images; depth, mask and normal folders are skipped",
        paper="every folder with images is a sequence, in natural order",
        parts=lambda root, options: base.image_folders(root),
        sequences=folder,
        options={
            "min_frames": Option(1, "skip shorter sequences", min=1),
            "single": Option(False, "every image is a sequence"),
        },
    ),
}

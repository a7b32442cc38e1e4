"""Videos of objects: CO3D and WildRGB-D, with poses, intrinsics, depth and masks. A video is a sequence."""

import gzip
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Cameras, Option, Options
from fastmum.data.builders.cameras import by_name, from_K, inverse, read_table, reading
from fastmum.data.depth import DepthFormat
from fastmum.data.manifest import SequenceRecord
from fastmum.files import read_json
from fastmum.geometry.camera import camera_from_pytorch3d

log = logging.getLogger(__name__)

PAPER = "the whole video, if it has at least 24 frames"
OPTIONS = {"min_frames": base.MIN_FRAMES["min_frames"]._replace(default=24)} | base.POSES | base.DEPTH

CATEGORIES = Option(None, "all, or seen: the 41 that others train on (default all; released seen)",
                    type=str, choices=("all", "seen"))  # fmt: skip
ANNOTATIONS = "frame_annotations.jgz"
TRAINING_LIST = "set_lists/set_lists_fewview_dev.json"  # of RelPose's preprocessing, which the released one follows
# The 41 categories that RelPose and later work train on, as many as the paper names; the other ten are for tests.
SEEN = frozenset(
    """apple backpack banana baseballbat baseballglove bench bicycle bottle bowl broccoli cake car carrot cellphone
    chair cup donut hairdryer handbag hydrant keyboard laptop microwave motorcycle mouse orange parkingmeter pizza
    plant stopsign teddybear toaster toilet toybus toyplane toytrain toytruck tv umbrella vase wineglass""".split()  # noqa: SIM905
)


def co3d_parts(root: Path, options: Options) -> list[str]:
    """Categories with annotations."""
    names = base.matching_folders(root, "*", ANNOTATIONS)
    seen = (options.categories or ("seen" if options.rule == "released" else "all")) == "seen"
    return [name for name in names if name in SEEN or not seen]


def co3d(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """Videos of a category by name, frames by number; released: frames of the training split."""
    training = None
    if options.rule == "released":
        if not (list_file := root / part / TRAINING_LIST).is_file():
            log.warning("skipped: '%s' does not exist, which lists the training split of the category", list_file)
            return
        with reading(list_file, "a set list of CO3D"):
            listed = read_json(list_file)["train"]
            training = {(name, number) for name, number, _ in listed}
    yield from co3d_videos(root, part, options, training)


def co3d_videos(
    root: Path, part: str, options: Options, kept: Collection[tuple[str, int]] | None = None,
    order: Callable[[tuple[str, int]], int] = lambda frame: frame[1],
) -> Iterator[SequenceRecord]:  # fmt: skip
    """Videos of a category by name; `kept` are the (video, number) of frames, None: all. `order` sorts those."""
    with reading(file := root / part / ANNOTATIONS, "CO3D frame annotations"):
        with file.open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8-sig") as stream:
            annotations = json.load(stream)
        videos = defaultdict(list)
        for frame in annotations:
            if kept is None or (frame["sequence_name"], frame["frame_number"]) in kept:
                videos[frame["sequence_name"]].append(frame)
        for name in sorted(videos):
            frames = sorted(videos[name], key=lambda frame: order((name, frame["frame_number"])))
            depths, masks = ([frame.get(key) or {} for frame in frames] for key in ("depth", "mask"))
            images = [frame["image"]["path"] for frame in frames]
            maps = {"depths": [depth.get("path", "") for depth in depths], "masks": [m.get("path", "") for m in masks]}
            # "depth = png * scale_adjustment" (the data set's data_types.py), z in the unit of the reconstruction.
            z, cameras = DepthFormat("co3d"), partial(co3d_cameras, frames)
            video = base.make_scene(root, f"{part}/{name}", images, options, cameras, depth_format=z, **maps)
            units = np.array([depth.get("scale_adjustment", 1.0) for depth in depths], np.float64)
            yield from base.whole(video._replace(depth_units=units), options)


def co3d_cameras(frames: list[dict[str, Any]]) -> Cameras:
    """camera_from_world (n, 4, 4) and fx fy cx cy (n, 4) of frame annotations, NaN where there is no viewpoint."""
    poses = np.full((len(frames), 4, 4), np.nan, np.float32)
    intrinsics = np.full((len(frames), 4), np.nan, np.float32)
    for i, frame in enumerate(frames):
        if frame.get("viewpoint") is not None:
            height, width = frame["image"]["size"]
            camera = camera_from_pytorch3d(frame["viewpoint"], (width, height))
            poses[i], intrinsics[i] = camera.camera_from_world, camera.K[[0, 1, 0, 1], [0, 1, 2, 2]]
    return poses, intrinsics


def wildrgbd_parts(root: Path, options: Options) -> list[str]:
    """The videos of all categories that are not excluded."""
    videos = base.matching_folders(root, "*/scenes/*")
    kept = base.without_excluded([*dict.fromkeys(video.partition("/")[0] for video in videos)], options)
    return [video for video in videos if video.partition("/")[0] in kept]


def wildrgbd(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The whole video."""
    names = base.images_in(root / part / "rgb")
    frames, depths, masks = ([f"{part}/{kind}/{name}" for name in names] for kind in ("rgb", "depth", "masks"))
    # "depth scale of 1000 ... in meters" (the data set's README); z, as its script of point clouds unprojects it.
    z, cameras = DepthFormat("png16", unit=1e-3), partial(wildrgbd_cameras, root / part, names)
    video = base.make_scene(root, part.replace("/scenes/", "/"), frames, options, cameras, depths, z, masks)
    yield from base.whole(video, options)


def wildrgbd_cameras(folder: Path, names: list[str]) -> Cameras:
    """Poses and intrinsics, None if their file is missing.

    cam_poses.txt: a frame's number and world_from_camera row by row, OpenCV axes. metadata: K column by column.
    """
    poses = intrinsics = None
    if (file := folder / "cam_poses.txt").is_file():
        lines = read_table(file, 17, "poses")
        with reading(file, "poses"):  # a matrix may be singular
            matrices = inverse(lines[:, 1:].reshape(-1, 4, 4))
        by_number = dict(zip(lines[:, 0].astype(int).tolist(), matrices, strict=True))
        numbers = {name: int(stem) for name in names if (stem := name.partition(".")[0]).isdecimal()}
        poses = by_name(names, {name: by_number[number] for name, number in numbers.items() if number in by_number})
    if (file := folder / "metadata").is_file():
        with reading(file, "a video's metadata"):
            K = np.array(read_json(file)["K"], float).reshape(3, 3).T
        intrinsics = np.tile(from_K(K), (len(names), 1))
    return poses, intrinsics


BUILDERS = {
    "co3d": Builder(
        layout=f"<category>/{ANNOTATIONS} and the images that it names; optional: its depth maps and masks",
        paper=PAPER,
        released=f"frames of the training split (<category>/{TRAINING_LIST}), of 41 categories",
        parts=co3d_parts,
        sequences=co3d,
        options={"categories": CATEGORIES} | OPTIONS,
    ),
    "wildrgbd": Builder(
        layout="<category>/scenes/<video>/rgb/*; optional: cam_poses.txt, metadata, depth/*, masks/*",
        paper=PAPER,
        parts=wildrgbd_parts,
        sequences=wildrgbd,
        options=OPTIONS | base.EXCLUDE,
    ),
}

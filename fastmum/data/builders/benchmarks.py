"""Sequences that reconstruction is evaluated on: CO3D and RealEstate10K (poses), DTU and ETH3D (points)."""

import gzip
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Cameras, Options
from fastmum.data.builders.cameras import by_name, from_K, reading
from fastmum.data.builders.objects import ANNOTATIONS, TRAINING_LIST, co3d_videos
from fastmum.data.builders.scenes import mvsnet_cameras, realestate10k
from fastmum.data.depth import DepthFormat
from fastmum.data.manifest import SequenceRecord
from fastmum.files import read_json

# Of davnords/vggt (evaluation/test_co3d.py); DTU and ETH3D as in Pi3's evaluation, which it follows.
CO3D_CATEGORIES = frozenset(
    """apple backpack bench book bowl car cellphone donut frisbee handbag hotdog hydrant motorcycle parkingmeter pizza
    stopsign teddybear toaster toybus tv""".split()  # noqa: SIM905
)
CO3D_QUALITY, CO3D_FARTHEST = 0.5, 1e5  # of viewpoints; a sum of translations beyond it is an error of the annotation
SEQUENCES = "sequence_annotations.jgz"
DTU_SCANS = (1, 4, *range(9, 14), 15, 23, 24, 29, 32, 33, 34, 48, 49, 62, 75, 77, 110, 114, 118)
EVERY, DTU_FRAMES = 5, 50  # every fifth frame, of the first 50 of DTU
LEAST = {"min_frames": base.MIN_FRAMES["min_frames"]._replace(default=10)}


def co3d_test(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """Frames of the test list, in its order, of videos with good viewpoints."""
    with (
        reading(file := root / part / SEQUENCES, "CO3D sequence annotations"),
        file.open("rb") as packed,
        gzip.open(packed, "rt", encoding="utf-8-sig") as stream,
    ):
        good = {s["sequence_name"] for s in json.load(stream) if s["viewpoint_quality_score"] > CO3D_QUALITY}
    with reading(file := root / part / TRAINING_LIST, "a set list of CO3D"):
        listed = [(name, number) for name, number, _ in read_json(file)["test"] if name in good]
    places = {frame: i for i, frame in enumerate(listed)}
    for video in co3d_videos(root, part, options, places, places.__getitem__):
        # PyTorch3D's translation: x and y are negated.
        sums = np.array([0.0]) if video.poses is None else video.poses[:, :3, 3] @ (-1, -1, 1)
        if not (sums > CO3D_FARTHEST).any():
            yield video


def realestate10k_test(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The whole clip."""
    yield from realestate10k(root, part, Options(**vars(options) | {"chunk": 0}))


def dtu(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """Frames 0, 5, ..., 45 of a scan, in millimetres, with masks of the object."""
    present = {name.partition(".")[0] for name in base.images_in(root / part / "images")}
    stems = [stem for i in range(0, DTU_FRAMES, EVERY) if (stem := f"{i:08d}") in present]
    frames, depths, masks = (
        [f"{part}/{folder}/{stem}.{suffix}" for stem in stems]
        for folder, suffix in (("images", "jpg"), ("depths", "npy"), ("binary_masks", "png"))
    )
    cameras = partial(mvsnet_cameras, root / part / "cams", stems)
    yield from base.whole(
        base.make_scene(root, part, frames, options, cameras, depths, DepthFormat("npy"), masks), options
    )


def eth3d(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """Every fifth image of a scene."""
    names = base.images_in(root / part / "images/custom_undistorted")[::EVERY]
    frames, depths = (
        [f"{part}/{folder}/custom_undistorted/{name}" for name in names] for folder in ("images", "ground_truth_depth")
    )

    def cameras() -> Cameras:
        poses, intrinsics = {}, {}
        for name in names:
            file = root / part / "custom_undistorted_cam" / f"{name.rpartition('.')[0]}.npz"
            with reading(file, "a camera of ETH3D"), file.open("rb") as packed, np.load(packed) as content:
                poses[name] = np.vstack([content["extrinsics"][:3], [0, 0, 0, 1]])
                intrinsics[name] = from_K(content["intrinsics"])
        return by_name(names, poses), by_name(names, intrinsics, (4,))

    yield from base.whole(base.make_scene(root, part, frames, options, cameras, depths, DepthFormat("eth3d")), options)


BUILDERS = {
    "co3d_test": Builder(
        layout=f"<category>/{{{ANNOTATIONS},{SEQUENCES},{TRAINING_LIST}}} and the images that the list names",
        paper=f"frames of the list's test split, of {len(CO3D_CATEGORIES)} categories, good viewpoints only",
        parts=lambda root, options: [
            name for name in base.matching_folders(root, "*", ANNOTATIONS) if name in CO3D_CATEGORIES
        ],
        sequences=co3d_test,
        options=LEAST | base.POSES | base.DEPTH,
    ),
    "realestate10k_test": Builder(
        layout="test/<clip>/*.png, test/<clip>.txt",
        paper="the whole clip",
        parts=lambda root, options: base.matching_folders(root, "test/*"),
        sequences=realestate10k_test,
        options=LEAST | base.POSES,
    ),
    "dtu": Builder(
        layout="scan<N>/{images/%08d.jpg,depths/%08d.npy,binary_masks/%08d.png,cams/%08d_cam.txt} (Pi3's evaluation)",
        paper=f"frames 0, 5, ..., 45 of {len(DTU_SCANS)} scans",
        parts=lambda root, options: [f"scan{i}" for i in DTU_SCANS if (root / f"scan{i}/images").is_dir()],
        sequences=dtu,
        options=base.MIN_FRAMES | base.POSES | base.DEPTH,
    ),
    "eth3d": Builder(
        layout="<scene>/{images,ground_truth_depth}/custom_undistorted/*.JPG, custom_undistorted_cam/*.npz "
        "(Pi3's evaluation)",
        paper="every fifth image of a scene",
        parts=lambda root, options: base.matching_folders(root, "*", "custom_undistorted_cam"),
        sequences=eth3d,
        options=base.MIN_FRAMES | base.POSES | base.DEPTH,
    ),
}

"""CO3D: whole videos of objects, with poses and intrinsics from the frame annotations."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastmum.data.builders.base import Builder, Option, Options
from fastmum.data.builders.cameras import reading
from fastmum.data.builders.listing import folders_in
from fastmum.data.builders.scene import MIN_FRAMES, POSES, whole
from fastmum.data.manifest import SequenceRecord

ANNOTATIONS = "frame_annotations.jgz"
# The categories that RelPose and those after it train on; as many as the paper names. The other ten are for tests.
SEEN = frozenset(
    """apple backpack banana baseballbat baseballglove bench bicycle bottle bowl broccoli cake car carrot cellphone
    chair cup donut hairdryer handbag hydrant keyboard laptop microwave motorcycle mouse orange parkingmeter pizza
    plant stopsign teddybear toaster toilet toybus toyplane toytrain toytruck tv umbrella vase wineglass""".split()  # noqa: SIM905
)
PYTORCH3D_TO_OPENCV = np.diag([-1.0, -1.0, 1.0])


def parts(root: Path, options: Options) -> list[str]:
    """Categories with annotations."""
    found = [name for name in folders_in(root) if (root / name / ANNOTATIONS).is_file()]
    return [name for name in found if options.categories == "all" or name in SEEN]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """Videos of a category in the order of their names, frames in that of their numbers."""
    file = root / part / ANNOTATIONS
    with reading(file, "CO3D frame annotations"):
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            annotations = json.load(stream)
        videos = defaultdict(list)
        for frame in annotations:
            videos[frame["sequence_name"]].append(frame)
        for name in sorted(videos):
            frames = sorted(videos[name], key=lambda frame: frame["frame_number"])
            paths = [frame["image"]["path"] for frame in frames]
            poses = intrinsics = None
            if options.poses:
                cameras = [camera(frame) for frame in frames]
                poses, intrinsics = (np.array(values, np.float32) for values in zip(*cameras, strict=True))
            yield from whole(SequenceRecord(f"{part}/{name}", paths, poses, intrinsics), options)


def camera(frame: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """DistContext-to-camera (4, 4) and fx fy cx cy of a frame annotation, NaN where it has no viewpoint.

    PyTorch3D transforms row vectors, x_camera = x_world R + T, and measures on the image from its centre to the left
    and up, in half sides (`ndc_norm_image_bounds`) or in halves of the shorter side (`ndc_isotropic`).
    """
    viewpoint = frame.get("viewpoint")
    if viewpoint is None:
        return np.full((4, 4), np.nan), np.full(4, np.nan)
    pose = np.eye(4)
    pose[:3, :3] = PYTORCH3D_TO_OPENCV @ np.array(viewpoint["R"], float).T
    pose[:3, 3] = PYTORCH3D_TO_OPENCV @ np.array(viewpoint["T"], float)
    height, width = frame["image"]["size"]
    half = np.array([width, height]) / 2
    match viewpoint.get("intrinsics_format", "ndc_norm_image_bounds"):
        case "ndc_norm_image_bounds":
            unit = half
        case "ndc_isotropic":
            unit = np.full(2, half.min())
        case other:
            raise ValueError(f"unknown intrinsics_format '{other}'")
    focal = np.array(viewpoint["focal_length"]) * unit
    centre = half - np.array(viewpoint["principal_point"]) * unit
    return pose, np.concatenate([focal, centre])


BUILDER = Builder(
    layout="<category>/frame_annotations.jgz and the images that it names",
    paper="the whole video, if it has at least 24 frames",
    parts=parts,
    sequences=sequences,
    options={
        "min_frames": MIN_FRAMES._replace(default=24),
        "categories": Option("all", "all, or seen: the 41 that others train on", choices=("all", "seen")),
        "poses": POSES,
    },
)

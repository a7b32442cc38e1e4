"""CO3D: whole videos of objects, with poses, intrinsics, depth and masks from the frame annotations."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Option, Options
from fastmum.data.builders.cameras import reading
from fastmum.data.depth import DepthFormat
from fastmum.data.manifest import SequenceRecord

ANNOTATIONS = "frame_annotations.jgz"
# The 41 categories that RelPose and later work train on, as many as the paper names; the other ten are for tests.
SEEN = frozenset(
    """apple backpack banana baseballbat baseballglove bench bicycle bottle bowl broccoli cake car carrot cellphone
    chair cup donut hairdryer handbag hydrant keyboard laptop microwave motorcycle mouse orange parkingmeter pizza
    plant stopsign teddybear toaster toilet toybus toyplane toytrain toytruck tv umbrella vase wineglass""".split()  # noqa: SIM905
)
PYTORCH3D_TO_OPENCV = np.diag([-1.0, -1.0, 1.0])
# "depth = png * scale_adjustment" (data_types.py of the data set's code), z in the unit of the reconstruction.
DEPTH = DepthFormat("co3d")


def parts(root: Path, options: Options) -> list[str]:
    """Categories with annotations."""
    found = [name for name in base.folders_in(root) if (root / name / ANNOTATIONS).is_file()]
    return [name for name in found if options.categories == "all" or name in SEEN]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """Videos of a category by name, frames by number."""
    file = root / part / ANNOTATIONS
    with reading(file, "CO3D frame annotations"):
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            annotations = json.load(stream)
        videos = defaultdict(list)
        for frame in annotations:
            videos[frame["sequence_name"]].append(frame)
        for name in sorted(videos):
            frames = sorted(videos[name], key=lambda frame: frame["frame_number"])
            video = SequenceRecord(f"{part}/{name}", [frame["image"]["path"] for frame in frames])
            if options.poses:
                cameras = [camera(frame) for frame in frames]
                poses, intrinsics = (np.array(values, np.float32) for values in zip(*cameras, strict=True))
                video = video._replace(poses=poses, intrinsics=intrinsics)
            if options.depth:
                depths, masks = ([frame.get(key) or {} for frame in frames] for key in ("depth", "mask"))
                video = video._replace(
                    depths=base.existing(root, [depth.get("path", "") for depth in depths]),
                    masks=base.existing(root, [mask.get("path", "") for mask in masks]),
                    depth_format=DEPTH,
                    depth_units=np.array([depth.get("scale_adjustment", 1.0) for depth in depths], np.float64),
                )
            yield from base.whole(video, options)


def camera(frame: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """camera_from_world (4, 4) and fx fy cx cy of a frame annotation, NaN where it has no viewpoint.

    PyTorch3D transforms row vectors, x_camera = x_world R + T. Its image coordinates start at the centre and increase
    to the left and up, in half sides (`ndc_norm_image_bounds`) or halves of the shorter side (`ndc_isotropic`).
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
    layout="<category>/frame_annotations.jgz and the images that it names; optional: its depth maps and masks",
    paper="the whole video, if it has at least 24 frames",
    parts=parts,
    sequences=sequences,
    options={
        "min_frames": base.MIN_FRAMES._replace(default=24),
        "categories": Option("all", "all, or seen: the 41 that others train on", choices=("all", "seen")),
        **base.CAMERA_OPTIONS,
        **base.DEPTH_OPTIONS,
    },
)

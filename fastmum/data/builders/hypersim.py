"""Hypersim: whole scenes, all cameras together, with poses, intrinsics and depth."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.cameras import OPENGL_TO_OPENCV, by_name, image_size, inverse, reading
from fastmum.data.depth import DepthFormat, read_hdf5
from fastmum.data.manifest import SequenceRecord

PREFIX, SUFFIX = "scene_cam_", "_final_preview"
# "Euclidean distances (in meters) to the optical center" (README of the data set), NaN where nothing is hit.
DEPTH = DepthFormat("hdf5", kind="ray")
PARAMETERS = "metadata_camera_parameters.csv"  # from the toolkit's repository, contrib/mikeroberts3000


def parts(root: Path, options: Options) -> list[str]:
    """Scenes, `ai_001_001`."""
    return [scene for scene in base.folders_in(root) if (root / scene / "images").is_dir()]


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The whole scene, camera by camera; released: the first camera only.

    A folder may hold several renderings of a frame (`frame.0000.color.jpg`, `.tonemap.jpg`, ...). The paper's rule
    takes the tone-mapped ones if there are any, so that no two frames are the same view.
    """
    calibration = _calibration(root / PARAMETERS, part) if options.poses else None
    frames: list[str] = []
    depths: list[str] = []
    poses, intrinsics = [], []
    for folder in base.folders_in(root / part / "images"):
        camera = folder.removeprefix(PREFIX).removesuffix(SUFFIX)
        if folder != PREFIX + camera + SUFFIX or (options.rule == "released" and camera != "00"):
            continue
        images = root / part / "images" / folder
        names = [name for name in base.images_in(images) if name.lower().endswith(".jpg")]
        if options.rule == "paper":
            names = [name for name in names if name.endswith(".tonemap.jpg")] or names
        frames += [f"{part}/images/{folder}/{name}" for name in names]
        maps = f"{part}/images/{PREFIX}{camera}_geometry_hdf5"
        depths += [f"{maps}/frame.{name.split('.')[1]}.depth_meters.hdf5" for name in names]
        if calibration is not None and names and (size := image_size(images, names)):
            scale, cam_from_uv = calibration
            K, turn = _intrinsics(cam_from_uv, *size)
            intrinsics.append(np.tile(np.float32([K[0, 0], K[1, 1], K[0, 2], K[1, 2]]), (len(names), 1)))
            poses.append(turn @ _poses(root / part / "_detail" / f"cam_{camera}", names, scale))
    scene = SequenceRecord(part, frames)
    if poses:
        scene = scene._replace(poses=np.concatenate(poses), intrinsics=np.concatenate(intrinsics))
    if options.depth:
        scene = scene._replace(depths=base.existing(root, depths), depth_format=DEPTH)
    yield from base.whole(scene, options)


def _calibration(file: Path, scene: str) -> tuple[float, np.ndarray] | None:
    """Metres per asset unit, and the matrix from u v 1 to rays; None if the scene or the file is missing."""
    if not file.is_file():
        return None
    with reading(file, "camera parameters of Hypersim"), file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            if row["scene_name"] == scene:
                matrix = np.array([[float(row[f"M_cam_from_uv_{i}{j}"]) for j in range(3)] for i in range(3)])
                return float(row["settings_units_info_meters_scale"]), matrix
    return None


def _intrinsics(cam_from_uv: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """K (3, 3) and the turn (4, 4) from the stored camera to the one that K belongs to, in OpenCV axes.

    u and v range from -1 to 1, v upwards. Some scenes have a tilted image plane: the pixels are those of a pinhole
    camera that is turned, so pixel_from_ray = K turn, an RQ decomposition.
    """
    uv_from_pixel = np.array([[2 / width, 0, -1], [0, -2 / height, 1], [0, 0, 1]])
    pixel_from_ray = np.linalg.inv(OPENGL_TO_OPENCV[:3, :3] @ cam_from_uv @ uv_from_pixel)
    q, r = np.linalg.qr(pixel_from_ray[::-1].T)
    K, rotation = r.T[::-1, ::-1], q.T[::-1]
    signs = np.sign(np.diag(K))
    turn = np.eye(4, dtype=np.float32)
    turn[:3, :3] = rotation * signs[:, None]
    return K * signs / np.abs(K[2, 2]), turn


def _poses(folder: Path, names: list[str], scale: float) -> np.ndarray:
    """camera_from_world in metres; files hold world_from_camera rotations (OpenGL axes) and centres in asset units."""
    files = [folder / f"camera_keyframe_{what}.hdf5" for what in ("frame_indices", "orientations", "positions")]
    if not all(file.is_file() for file in files):
        return by_name(names, {})
    with reading(folder, "camera keyframes of Hypersim"):
        numbers, rotations, centres = map(read_hdf5, files)
        world_from_camera = np.tile(np.eye(4), (len(numbers), 1, 1))
        world_from_camera[:, :3, :3], world_from_camera[:, :3, 3] = rotations, centres * scale
        poses = dict(zip(numbers.tolist(), inverse(world_from_camera @ OPENGL_TO_OPENCV), strict=True))
        known = {name: poses[number] for name in names if (number := int(name.split(".")[1])) in poses}
    return by_name(names, known)


BUILDER = Builder(
    layout=f"<scene>/images/scene_cam_*_final_preview/*.jpg; optional: scene_cam_*_geometry_hdf5, <scene>/_detail, "
    f"{PARAMETERS}",
    paper="the whole scene, all its cameras in one sequence",
    released="camera 00 only",
    parts=parts,
    sequences=sequences,
    options={"min_frames": base.MIN_FRAMES, **base.CAMERA_OPTIONS, **base.DEPTH_OPTIONS},
)

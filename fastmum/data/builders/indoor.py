"""Indoor scenes: ARKitScenes, Hypersim and ScanNet++, with poses, intrinsics, and depth or masks."""

import csv
import logging
import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import natsort
import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Cameras, Options
from fastmum.data.builders.cameras import by_name, from_K, from_opengl, image_size, read_nerfstudio, read_table, reading
from fastmum.data.depth import DepthFormat, read_hdf5
from fastmum.data.manifest import SequenceRecord
from fastmum.files import read_json

log = logging.getLogger(__name__)

ARKIT_TRAINING, ARKIT_IMAGES = "3dod/Training", "lowres_wide"
ARKIT_RELEASED_CHUNK = 75
ARKIT_VISITS = "3dod_train_val_splits.csv"  # from the data set's repository, threedod
# Seconds: names and trajectory round time stamps differently, and poses come at 10 Hz.
ARKIT_TIME_TOLERANCE = 5e-3
HYPERSIM_PREFIX, HYPERSIM_SUFFIX = "scene_cam_", "_final_preview"
HYPERSIM_CAMERAS = "metadata_camera_parameters.csv"  # from the toolkit's repository, contrib/mikeroberts3000
SCANNETPP_IMAGES, SCANNETPP_MASKS = "resized_undistorted_images", "resized_undistorted_masks"


def arkitscenes(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """Frames of the wide camera of a scan, in chunks."""
    scan_id = part.rpartition("/")[2]
    folder = f"{part}/{scan_id}_frames"
    names = base.images_in(root / folder / ARKIT_IMAGES)
    frames = [f"{folder}/{ARKIT_IMAGES}/{name}" for name in names]
    depths = [f"{folder}/lowres_depth/{name}" for name in names]
    # "uint16 png format in millimeters" (the data set's DATA.md), z: its tools unproject x = (u - cx) z / fx.
    z = DepthFormat("png16", unit=1e-3)
    cameras = partial(arkit_cameras, root / folder, names)
    scan = base.make_scene(root, scan_id, frames, options, cameras, depths, z)
    yield from base.chunks(scan._replace(scene=_arkit_visits(root).get(scan_id)), options, ARKIT_RELEASED_CHUNK)


@cache
def _arkit_visits(root: Path) -> dict[str, str]:
    """The visit that a scan belongs to, where it is known: scans of a visit show the same rooms."""
    file = root / ARKIT_VISITS
    if not file.is_file():
        return {}
    with reading(file, "visits of ARKitScenes"), file.open(newline="", encoding="utf-8") as stream:
        visits = {row["video_id"]: row["visit_id"] for row in csv.DictReader(stream)}
        return {scan: f"visit {visit}" for scan, visit in visits.items() if visit not in ("", "NA")}


def arkit_begin(root: Path, options: Options) -> None:
    """Say what the scenes are."""
    _arkit_visits.cache_clear()
    if not _arkit_visits(root):
        log.warning("there is no '%s', so scans of the same rooms are not held out together", root / ARKIT_VISITS)


def arkit_cameras(folder: Path, names: list[str]) -> Cameras:
    """Poses (None if there is no trajectory) and intrinsics.

    The trajectory has lines of seconds, rotation vector, translation: camera_from_world, OpenCV axes (the data set's
    code). There is one file of intrinsics per frame, `width height fx fy cx cy`.
    """
    from scipy.spatial.transform import Rotation  # slow to import

    # Names contain seconds with a decimal point.
    files = {name: folder / f"{ARKIT_IMAGES}_intrinsics" / f"{name.rpartition('.')[0]}.pincam" for name in names}
    found = {name: read_table(file, 6, "intrinsics")[0, 2:] for name, file in files.items() if file.is_file()}
    intrinsics = by_name(names, found, (4,))
    file = folder / f"{ARKIT_IMAGES}.traj"
    if not file.is_file():
        return None, intrinsics
    lines = read_table(file, 7, "a trajectory")
    lines = lines[np.argsort(lines[:, 0])]
    stamps = [name.rpartition(".")[0].rpartition("_")[2] for name in names]
    times = np.array([float(stamp) if re.fullmatch(r"\d+(\.\d*)?", stamp) else np.nan for stamp in stamps])
    nearest = np.searchsorted((lines[1:, 0] + lines[:-1, 0]) / 2, times)
    poses = np.tile(np.eye(4, dtype=np.float32), (len(names), 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(lines[nearest, 1:4]).as_matrix()
    poses[:, :3, 3] = lines[nearest, 4:]
    poses[~(np.abs(lines[nearest, 0] - times) < ARKIT_TIME_TOLERANCE)] = np.nan
    return poses, intrinsics


def hypersim(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The whole scene, camera by camera; released: the first camera only.

    A folder may hold several renderings of a frame (`frame.0000.color.jpg`, `.tonemap.jpg`, ...). The paper's rule
    takes the tone-mapped ones if there are any, so that no two frames are the same view.
    """
    cameras: dict[str, list[str]] = {}  # names of frames
    for folder in base.folders_in(root / part / "images"):
        camera = folder.removeprefix(HYPERSIM_PREFIX).removesuffix(HYPERSIM_SUFFIX)
        if folder != HYPERSIM_PREFIX + camera + HYPERSIM_SUFFIX or (options.rule == "released" and camera != "00"):
            continue
        names = [name for name in base.images_in(root / part / "images" / folder) if name.lower().endswith(".jpg")]
        if options.rule == "paper":
            names = [name for name in names if name.endswith(".tonemap.jpg")] or names
        cameras[camera] = names
    prefix = f"{part}/images/{HYPERSIM_PREFIX}"
    frames = [f"{prefix}{camera}{HYPERSIM_SUFFIX}/{name}" for camera, names in cameras.items() for name in names]
    numbers = [(camera, name.split(".")[1]) for camera, names in cameras.items() for name in names]
    depths = [f"{prefix}{camera}_geometry_hdf5/frame.{number}.depth_meters.hdf5" for camera, number in numbers]
    # "Euclidean distances (in meters) to the optical center" (the data set's README), NaN where nothing is hit.
    ray = DepthFormat("hdf5", kind="ray")
    scene = base.make_scene(root, part, frames, options, partial(hypersim_cameras, root, part, cameras), depths, ray)
    yield from base.whole(scene, options)


def hypersim_cameras(root: Path, scene: str, cameras: dict[str, list[str]]) -> Cameras:
    """Poses in metres and intrinsics of all frames; None if there is no file of camera parameters.

    The file's matrix maps u v 1, from -1 to 1 and v upwards, to rays. Some scenes have a tilted image plane: their
    pixels are those of a rotated pinhole camera, so pixel_from_ray = K R, an RQ decomposition.
    """
    from scipy.linalg import rq  # slow to import

    file = root / HYPERSIM_CAMERAS
    if not file.is_file():
        return None, None
    with reading(file, "camera parameters of Hypersim"), file.open(encoding="utf-8-sig", newline="") as stream:
        row = {row["scene_name"]: row for row in csv.DictReader(stream)}[scene]
        cam_from_uv = np.array([[float(row[f"M_cam_from_uv_{i}{j}"]) for j in range(3)] for i in range(3)])
        scale = float(row["settings_units_info_meters_scale"])
    images = root / scene / "images"
    folders = ((images / f"{HYPERSIM_PREFIX}{camera}{HYPERSIM_SUFFIX}", names) for camera, names in cameras.items())
    sizes = (image_size(folder, names) for folder, names in folders)
    if (size := next(filter(None, sizes), None)) is None:
        return None, None
    uv_from_pixel = np.array([[2 / size[0], 0, -1], [0, -2 / size[1], 1], [0, 0, 1]])
    K, R = rq(np.linalg.inv(np.diag([1.0, -1.0, -1.0]) @ cam_from_uv @ uv_from_pixel))
    signs = np.sign(np.diag(K))
    turn = np.eye(4, dtype=np.float32)
    turn[:3, :3] = R * signs[:, None]
    detail, intrinsics = root / scene / "_detail", from_K(K * signs / np.abs(K[2, 2]))
    poses = np.vstack([hypersim_poses(detail / f"cam_{camera}", names, scale) for camera, names in cameras.items()])
    if not ((intrinsics[2:] > 0) & (intrinsics[2:] < size)).all():  # no crop keeps it in the middle
        log.warning("skipped the cameras of %s: their principal point is outside of the image", scene)
        intrinsics[:] = np.nan
    return turn @ poses, np.tile(intrinsics, (len(poses), 1))


def hypersim_poses(folder: Path, names: list[str], scale: float) -> np.ndarray:
    """camera_from_world; files hold world_from_camera rotations (OpenGL axes) and centres in asset units."""
    files = [folder / f"camera_keyframe_{what}.hdf5" for what in ("frame_indices", "orientations", "positions")]
    if not all(file.is_file() for file in files):
        return by_name(names, {})
    with reading(folder, "camera keyframes of Hypersim"):
        numbers, rotations, centres = map(read_hdf5, files)
        world_from_camera = np.tile(np.eye(4), (len(numbers), 1, 1))
        world_from_camera[:, :3, :3], world_from_camera[:, :3, 3] = rotations, centres * scale
        poses = dict(zip(numbers.tolist(), from_opengl(world_from_camera), strict=True))
        return by_name(names, {n: poses[number] for n in names if (number := int(n.split(".")[1])) in poses})


def scannetpp(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The undistorted DSLR photographs of the training list, in chunks.

    They have no depth: the toolkit renders it for the fisheye originals. Masks are 0 where people were anonymised and
    outside the fisheye image. A scene without a list is skipped, which is logged.
    """
    dslr = root / part / "dslr"
    lists = dslr / "train_test_lists.json"
    if not lists.is_file():
        log.warning("skipped: '%s' does not exist, which lists the training photographs of the scene", lists)
        return
    with reading(lists, "a scene's training list"):
        listed = set(read_json(lists)["train"])
    names = natsort.natsorted(listed.intersection(base.images_in(dslr / SCANNETPP_IMAGES)))
    frames = [f"{part}/dslr/{SCANNETPP_IMAGES}/{name}" for name in names]
    masks = [f"{part}/dslr/{SCANNETPP_MASKS}/{name.rpartition('.')[0]}.png" for name in names]
    file = dslr / "nerfstudio" / "transforms_undistorted.json"
    cameras = partial(read_nerfstudio, file, names, dslr / SCANNETPP_IMAGES)
    scene = base.make_scene(root, part, frames, options, cameras, masks=masks)
    yield from base.chunks(scene, options, released=base.CHUNK)


BUILDERS = {
    "hypersim": Builder(
        layout="<scene>/images/scene_cam_*_final_preview/*.jpg; optional: scene_cam_*_geometry_hdf5, <scene>/_detail, "
        f"{HYPERSIM_CAMERAS}",
        paper="the whole scene, all its cameras in one sequence",
        released="camera 00 only",
        parts=lambda root, options: base.without_excluded(base.matching_folders(root, "*", "images"), options),
        sequences=hypersim,
        options=base.MIN_FRAMES | base.POSES | base.DEPTH | base.EXCLUDE,
    ),
    "scannetpp": Builder(
        layout=f"<scene>/dslr/{SCANNETPP_IMAGES}/*.JPG and <scene>/dslr/train_test_lists.json; "
        f"optional: dslr/nerfstudio/transforms_undistorted.json, dslr/{SCANNETPP_MASKS}",
        paper=f"photographs of the training list, {base.CHUNK_RULE}",
        released=f"chunks of {base.CHUNK}, the last one takes the rest",
        parts=lambda root, options: base.matching_folders(root, "*", f"dslr/{SCANNETPP_IMAGES}"),
        sequences=scannetpp,
        options=base.CHUNKED | base.POSES | base.DEPTH,
    ),
    "arkitscenes": Builder(
        layout=f"{ARKIT_TRAINING}/<id>/<id>_frames/{ARKIT_IMAGES}/*.png; optional: {ARKIT_IMAGES}.traj, "
        f"{ARKIT_IMAGES}_intrinsics, lowres_depth, {ARKIT_VISITS}",
        paper=base.CHUNK_RULE,
        released=f"chunks of {ARKIT_RELEASED_CHUNK}, the last one takes the rest",
        parts=lambda root, options: base.matching_folders(root, f"{ARKIT_TRAINING}/*"),
        sequences=arkitscenes,
        begin=arkit_begin,
        options=base.CHUNKED | base.POSES | base.DEPTH,
    ),
}

"""Sequences with depth and cameras of every frame: ScanNet, Virtual KITTI 2, MVS-Synth, PointOdyssey, RGB-D folders."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Cameras, Option, Options
from fastmum.data.builders.cameras import (
    by_name,
    from_K,
    image_size,
    inverse,
    read_nerfstudio,
    read_table,
    reading,
    scannet_intrinsics,
)
from fastmum.data.depth import DepthFormat, read_depth
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord
from fastmum.errors import some_names
from fastmum.files import read_json

log = logging.getLogger(__name__)

SCANNET_CHUNK = 24  # frames of a sequence of the authors' reconstruction, which are at least as long
VKITTI_FAR = 65535  # stored depth of the sky, which ends at 655.35 m
MVSSYNTH_SQUASHED = 810  # px; the 540p copy is 810 x 540, but its files have f_x for 1920 x 1080
POINTODYSSEY_UNIT = 1000 / 65535  # metres (the data set's README)

IMAGES = ("rgb", "color", "colour", "image", "images")  # folders of a user's scene, the first that exists
DEPTHS, MASKS, POSES = ("depth", "depths"), ("mask", "masks"), ("pose", "poses")
SUFFIXES = {".png": "png16", ".npy": "npy", ".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5", ".pfm": "pfm", ".exr": "exr"}
UNITS = {"png16": 1e-3}  # metres; 1 for the others
PROBED, MIXED = 5, 50.0  # maps of a scene whose medians are compared, and the ratio from which units are mixed
FARTHEST = 1000.0  # metres; a larger median depth needs `--unit`


def scenes_with(root: Path, *needs: str) -> list[str]:
    """Folders below the root, or one level deeper, that contain all of `needs`."""
    for pattern in ("*", "*/*"):
        found = base.matching_folders(root, pattern, needs[0])
        if found := [part for part in found if all((root / part / each).exists() for each in needs[1:])]:
            return found
    return []


def scannet(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The frames of a scan that have a pose, in chunks. Scans of a room, `scene0000_00` and `_01`, are one scene."""
    folder, scan = root / part, part.rpartition("/")[2]
    names = base.images_in(folder / "color")
    poses = {}
    if options.poses:
        for name in names:
            file = folder / "pose" / f"{name.rpartition('.')[0]}.txt"
            if file.is_file():
                world_from_camera = read_table(file, 4, "a pose").reshape(4, 4)
                if np.isfinite(world_from_camera).all():  # tracking is lost where it is infinite
                    poses[name] = inverse(world_from_camera)
        names = [name for name in names if name in poses] if poses else names
    frames = [f"{part}/color/{name}" for name in names]
    depths = [f"{part}/depth/{name.rpartition('.')[0]}.png" for name in names]
    z = DepthFormat("png16", unit=1e-3)  # "16-bit PNG, depth shift 1000" (the data set's README)

    def cameras() -> Cameras:
        size, files = image_size(folder / "color", names), [f"intrinsic_{kind}.txt" for kind in ("color", "depth")]
        colour, depth = (
            [read_table(file, 4, "intrinsics")] if (file := folder / "intrinsic" / name).is_file() else []
            for name in files
        )
        if size is None or not (colour or depth):
            return by_name(names, poses), None
        return by_name(names, poses), np.tile(from_K(scannet_intrinsics(colour, depth, size)), (len(names), 1))

    scene = base.make_scene(root, scan, frames, options, cameras, depths, z)
    yield from base.chunks(scene._replace(scene=scan.rpartition("_")[0] or None), options, released=SCANNET_CHUNK)


def vkitti2(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The drive of a camera. Its weathers, turns and two cameras are of one scene."""
    place, variant, _, _, camera = part.split("/")
    names = base.images_in(root / part)
    numbers = [name.partition(".")[0].rpartition("_")[2] for name in names]
    frames = [f"{part}/{name}" for name in names]
    depths = [f"{place}/{variant}/frames/depth/{camera}/depth_{number}.png" for number in numbers]
    # Centimetres along the optical axis (the data set's web page).
    z = DepthFormat("png16", unit=1e-2, unknown=VKITTI_FAR)

    def cameras() -> Cameras:
        tables: list[dict[str, np.ndarray]] = []
        for file, columns in ((f"{what}.txt", n) for what, n in (("extrinsic", 18), ("intrinsic", 6))):
            path = root / place / variant / file
            if not path.is_file():
                tables.append({})
                continue
            lines = read_table(path, columns, "cameras of Virtual KITTI", skip=1)
            mine = {f"{int(line[0]):05d}": line[2:] for line in lines if f"Camera_{int(line[1])}" == camera}
            tables.append({number: mine[number] for number in numbers if number in mine})
        poses = by_name(numbers, {number: line.reshape(4, 4) for number, line in tables[0].items()})
        # Their centre, 620.5 187 of 1242 x 375 pixels, counts pixel centres from 0.
        return poses, by_name(numbers, {number: line + [0, 0, 0.5, 0.5] for number, line in tables[1].items()}, (4,))

    drive = base.make_scene(root, f"{place}/{variant}/{camera}", frames, options, cameras, depths, z)
    yield from base.whole(drive._replace(scene=place), options)


def mvssynth(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The whole sequence, rendered by a game: the unit of length is about 0.1 m."""
    names = base.images_in(root / part / "images")
    stems = [name.rpartition(".")[0] for name in names]
    frames, depths = [f"{part}/images/{name}" for name in names], [f"{part}/depths/{stem}.exr" for stem in stems]
    z = DepthFormat("exr", max=1e9)  # infinite in the sky
    cameras = partial(mvssynth_cameras, root / part, names, stems)
    scene = base.make_scene(root, part.rpartition("/")[2], frames, options, cameras, depths, z)
    yield from base.whole(scene, options)


def mvssynth_cameras(folder: Path, names: list[str], stems: list[str]) -> Cameras:
    """camera_from_world and fx fy cx cy of JSON files, NaN where there is none.

    The world's axes are left-handed where the matrix is no rotation: it is mirrored then.
    """
    poses, intrinsics = {}, {}
    size = image_size(folder / "images", names)
    shrunk = MVSSYNTH_SQUASHED / 1920 if size is not None and size[0] == MVSSYNTH_SQUASHED else 1.0
    for stem in stems:
        if (file := folder / "poses" / f"{stem}.json").is_file():
            with reading(file, "a camera of MVS-Synth"):
                content = read_json(file)
                pose = np.array(content["extrinsic"], np.float64).reshape(4, 4)
                poses[stem] = pose * (1, np.sign(np.linalg.det(pose[:3, :3])), 1, 1)
                fx, *others = (float(content[key]) for key in ("f_x", "f_y", "c_x", "c_y"))
                intrinsics[stem] = np.array([fx * shrunk, *others])
    return by_name(stems, poses), by_name(stems, intrinsics, (4,))


def pointodyssey(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The whole video."""
    names = base.images_in(root / part / "rgbs")
    numbers = [name.partition(".")[0].rpartition("_")[2] for name in names]
    frames = [f"{part}/rgbs/{name}" for name in names]
    depths = [f"{part}/depths/depth_{number}.png" for number in numbers]
    z = DepthFormat("png16", unit=POINTODYSSEY_UNIT)
    cameras = partial(pointodyssey_cameras, root / part / "anno.npz", numbers)
    video = base.make_scene(root, part, frames, options, cameras, depths, z)
    yield from base.whole(video, options)


def pointodyssey_cameras(file: Path, numbers: list[str]) -> Cameras:
    """camera_from_world and intrinsics of a video; NaN for frames beyond those of the file."""
    with reading(file, "annotations of PointOdyssey"), file.open("rb") as packed, np.load(packed) as content:
        poses, K = (np.asarray(content[key], np.float32) for key in ("extrinsics", "intrinsics"))
        known = {number: int(number) for number in numbers if int(number) < len(poses)}
        found = {number: poses[i].reshape(4, 4) for number, i in known.items()}
        return by_name(numbers, found), by_name(numbers, {number: from_K(K[i]) for number, i in known.items()}, (4,))


def rgbd_parts(root: Path, options: Options) -> list[str]:
    """Folders at any depth, '.' for the root itself, that have a folder of images and one of depth."""
    folders = (folder for folder, _ in base.walk(root))
    return [each for each in folders if _one_of(root / each, IMAGES) and _one_of(root / each, DEPTHS)]


def _one_of(scene: Path, names: Sequence[str]) -> str:
    return next((name for name in names if (scene / name).is_dir()), "")


def rgbd(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The scene of a user: images, and depth, masks and poses of the same name but for the suffix."""
    scene, prefix = root / part, "" if part == "." else f"{part}/"
    images = _one_of(scene, IMAGES)
    names = base.images_in(scene / images)
    stems = [name.rpartition(".")[0] for name in names]
    depths, z = _rgbd_depths(scene, stems, options)
    masks = [f"{prefix}{folder}/{stem}.png" for stem in stems] if (folder := _one_of(scene, MASKS)) else []
    name = base.root_name(root) if part == "." else part
    cameras = partial(rgbd_cameras, scene, scene / images, names, stems, options.pose)
    frames = [f"{prefix}{images}/{name}" for name in names]
    paths = [depth and f"{prefix}{depth}" for depth in depths]
    yield from base.whole(base.make_scene(root, name, frames, options, cameras, paths, z, masks), options)


def _rgbd_depths(scene: Path, stems: list[str], options: Options) -> tuple[list[str], DepthFormat]:
    """Paths of depth maps below the scene, "" for frames without one, and their format.

    DataError: files of several formats, or depths that only mixed or other units explain.
    """
    folder = _one_of(scene, DEPTHS)
    files = {name.rpartition(".")[0]: name for name in base.names_in(scene / folder) if _reader(name)}
    if extra := sorted(files.keys() - set(stems)):
        first = some_names([f"'{files[stem]}'" for stem in extra])
        log.warning("%d depth maps in '%s' have no image of their name: %s", len(extra), scene / folder, first)
    found = [files.get(stem, "") for stem in stems]
    readers = sorted({_reader(name) for name in found if name})
    if not readers:
        raise DataError(f"no depth map in '{scene / folder}' has the name of an image; rename them, or use `folder`")
    if len(readers) > 1:
        raise DataError(f"depth maps in '{scene / folder}' are of several formats ({', '.join(readers)}); convert them")
    unit = UNITS.get(readers[0], 1.0) if options.unit is None else options.unit
    z = DepthFormat(readers[0], unit=unit, kind=options.kind)
    if options.depth:
        _check_units(scene / folder, [name for name in found if name], z, options.unit is not None)
    return [name and f"{folder}/{name}" for name in found], z


def _reader(name: str) -> str:
    return SUFFIXES.get(f".{name.rpartition('.')[2].lower()}", "") if not name.startswith(".") else ""


def _check_units(folder: Path, names: list[str], format: DepthFormat, given: bool) -> None:
    medians = {}
    for i in np.linspace(0, len(names) - 1, min(PROBED, len(names))).round().astype(int).tolist():
        depth = read_depth(folder / names[i], format)
        if depth.any():
            medians[names[i]] = float(np.median(depth[depth > 0]))
    if not medians:
        log.warning("no depth is known in %d depth maps of '%s' that were read", min(PROBED, len(names)), folder)
        return
    (near, low), (far, high) = (choose(medians.items(), key=lambda item: item[1]) for choose in (min, max))
    if high > MIXED * low:
        what = f"'{folder / near}' has a median depth of {low:.3g} m, and '{far}' of {high:.3g} m"
        raise DataError(f"{what}: their units are mixed; convert them to one")
    if not given and high > FARTHEST:
        raise DataError(f"'{folder / far}' has a median depth of {high:.3g} m; give the unit in metres, --unit 0.001")


def rgbd_cameras(scene: Path, images: Path, names: list[str], stems: list[str], direction: str) -> Cameras:
    """Poses and intrinsics from `transforms.json`, or from text files; None where there is no file."""
    if (file := scene / "transforms.json").is_file():
        return read_nerfstudio(file, names, images)
    intrinsics, poses = None, None
    if (file := scene / "intrinsics.txt").is_file():
        with reading(file, "intrinsics, fx fy cx cy or a matrix"), file.open(encoding="utf-8-sig") as stream:
            values = np.loadtxt(stream, ndmin=2)
            K = values.reshape(4) if values.size == 4 else from_K(values.reshape(len(values), len(values)))
        intrinsics = np.tile(np.asarray(K, np.float32), (len(names), 1))
    if (file := scene / "poses.txt").is_file():
        lines = read_table(file, 16, "poses").reshape(-1, 4, 4)
        if len(lines) != len(names):
            raise DataError(f"'{file}' has {len(lines)} poses for {len(names)} images; give a line for each, in order")
        poses = by_name(stems, dict(zip(stems, lines, strict=True)))
    elif folder := _one_of(scene, POSES):
        files = {stem: file for stem in stems if (file := scene / folder / f"{stem}.txt").is_file()}
        poses = by_name(stems, {stem: read_table(file, 4, "a pose").reshape(4, 4) for stem, file in files.items()})
    if poses is None or direction == "camera_from_world":
        return poses, intrinsics
    lost = ~np.isfinite(poses).all((1, 2))
    with reading(scene, "a scene's poses"):  # a matrix may be singular
        poses = inverse(np.where(lost[:, None, None], np.eye(4), poses.astype(np.float64)))
    poses[lost] = np.nan
    return poses, intrinsics


DIRECTIONS = ("world_from_camera", "camera_from_world")
OPTIONS = base.MIN_FRAMES | base.POSES | base.DEPTH
BUILDERS = {
    "scannet": Builder(
        layout="<scene>/color/*.jpg; optional: <scene>/depth/*.png, pose/*.txt, intrinsic/intrinsic_{color,depth}.txt",
        paper=f"frames with a pose in natural order, chunks of {SCANNET_CHUNK}, the last one shorter",
        released=f"chunks of {SCANNET_CHUNK}, the last one takes the rest",
        parts=lambda root, options: scenes_with(root, "color"),
        sequences=scannet,
        options=OPTIONS | {"chunk": base.CHUNK_OPTION._replace(default=SCANNET_CHUNK)},
    ),
    "vkitti2": Builder(
        layout="<scene>/<variant>/frames/rgb/Camera_*/rgb_*.jpg; optional: frames/depth, extrinsic.txt, intrinsic.txt",
        paper="the whole drive of each camera",
        parts=lambda root, options: base.matching_folders(root, "*/*/frames/rgb/*"),
        sequences=vkitti2,
        options=OPTIONS,
    ),
    "mvssynth": Builder(
        layout="<sequence>/images/*.png, such as GTAV_540/0000; optional: depths/*.exr, poses/*.json",
        paper="the whole sequence",
        parts=lambda root, options: scenes_with(root, "images", "poses"),
        sequences=mvssynth,
        options=OPTIONS,
    ),
    "pointodyssey": Builder(
        layout="<sequence>/{rgbs/rgb_*.jpg,anno.npz}, or <split>/<sequence>; optional: depths/depth_*.png",
        paper="the whole video",
        parts=lambda root, options: scenes_with(root, "rgbs", "anno.npz"),
        sequences=pointodyssey,
        options=OPTIONS,
    ),
    "rgbd": Builder(
        layout="any folders with {rgb,color,image,images}/* and {depth,depths}/* of the same names; optional: "
        "intrinsics.txt, poses.txt or {pose,poses}/*.txt, or transforms.json; {mask,masks}/*.png",
        paper="every such folder is a sequence, in natural order",
        parts=rgbd_parts,
        sequences=rgbd,
        options=OPTIONS | {
            "unit": Option(None, "metres per stored unit (default 0.001 for .png, 1 for others)", type=float, min=1e-9),
            "kind": Option("z", "depth along the optical axis, or along the ray of the pixel", choices=("z", "ray")),
            "pose": Option(DIRECTIONS[0], "what poses of text files are, OpenCV axes", choices=DIRECTIONS),
        },
    ),
}  # fmt: skip

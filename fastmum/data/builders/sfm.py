"""Image collections with COLMAP models: MegaDepth, MegaScenes and any others, chained by the paper's rules."""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

import natsort
import numpy as np

from fastmum.data import rules
from fastmum.data.builders import base, sparse
from fastmum.data.builders.base import Builder, Option, Options
from fastmum.data.builders.cameras import upright
from fastmum.data.colmap import Model, find_format, read_model
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError, reading
from fastmum.data.manifest import SequenceRecord
from fastmum.data.pair_lists import TEST_SCENES
from fastmum.data.rules import count_shared
from fastmum.errors import some_names
from fastmum.files import expand_user

log = logging.getLogger(__name__)

T = TypeVar("T")

FAR = 1e4  # units from the origin, where float32 has steps of a thousandth
SHORTEST = 2  # images of a chain of overlap: the fewest views that are sampled (supplement A, "Sampling")
RELEASED_MIN_IMAGES = 12  # of a MegaScenes model, in the released script

MEGADEPTH, MEGADEPTH_MODEL = "Undistorted_SfM", "sparse-txt"  # as D2-Net undistorts it
MEGADEPTH_DEPTHS = "phoenix/S6/zl548/MegaDepth_v1/{}/dense0/depths/{}.h5"
# Smaller files hold a foreground mask (ordinal depth) instead of a map (D2-Net's preprocess_scene.py).
MEGADEPTH_MIN_BYTES = 100 * 1024
MEGASCENES, MEGASCENES_IMAGES = "reconstruct", "images"
SEPARATOR = "\0"  # between the models of a part of `colmap`


def megadepth_parts(root: Path, options: Options) -> list[str]:
    """Undistorted scenes, those of `--scenes` if given, without those of `--exclude`."""
    present = base.folders_in(root / MEGADEPTH)
    if options.scenes:
        with reading(file := expand_user(options.scenes), "a list of scenes", "give a text file, a scene a line"):
            listed = file.read_text(encoding="utf-8-sig").split()
        if unknown := [scene for scene in dict.fromkeys(listed) if scene not in present]:
            log.warning("%d scenes of '%s' do not exist: %s", len(unknown), file, some_names(unknown))
        present = [scene for scene in present if scene in listed]
        if not present:
            raise DataError(f"no scene of '{file}' is in '{root / MEGADEPTH}'")
    scenes = base.without_excluded(present, options)
    if tested := [scene for scene in TEST_SCENES if scene in scenes]:
        log.warning(
            "MegaDepth-1500 tests on %s: --exclude %s before training what is evaluated on it",
            " and ".join(tested), ",".join(tested),
        )  # fmt: skip
    undistorted = [scene for scene in scenes if (root / MEGADEPTH / scene / MEGADEPTH_MODEL).is_dir()]
    if len(undistorted) < len(scenes):
        log.warning("skipped %d scenes without a folder %s", len(scenes) - len(undistorted), MEGADEPTH_MODEL)
    models = _whole_models(root, [f"{MEGADEPTH}/{scene}/{MEGADEPTH_MODEL}" for scene in undistorted], options)
    return [Path(model).parent.name for model in models]


def megadepth(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The chains of a scene."""
    model = _unless_broken(read_model, root / MEGADEPTH / part / MEGADEPTH_MODEL, options)
    if model is None:
        return

    def depth(name: str) -> str:
        path = MEGADEPTH_DEPTHS.format(part, name.rpartition(".")[0])
        return path if (root / path).is_file() and (root / path).stat().st_size >= MEGADEPTH_MIN_BYTES else ""

    images, z = f"{MEGADEPTH}/{part}/images", DepthFormat("hdf5")  # in the unit of the reconstruction, 0 where unknown
    yield from _sequences(root, part, images, model, options, "overlap", depth, z)


def megascenes_parts(root: Path, options: Options) -> list[str]:
    """Every model of every scene, such as reconstruct/001/234/colmap/0.

    A scene's number, six digits, is two folders. The folder between a scene and its models is `colmap` in the bucket
    and `sparses` in the documentation; any name is accepted.
    """
    return _whole_models(root, base.matching_folders(root, f"{MEGASCENES}/*/*/*/*"), options)


def megascenes(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The chains of a model, whose image names are `commons/<category>/0/pictures/<file>`."""
    _, high, low, _, number = part.split("/")
    model = _unless_broken(read_model, root / part, options)
    if model is not None:
        images = f"{MEGASCENES_IMAGES}/{high}/{low}"
        name, scene = f"{high}/{low}/{number}", f"{high}/{low}"
        yield from _sequences(root, name, images, model, options, "angle", scene=scene)


def colmap_parts(root: Path, options: Options) -> list[str]:
    """Folders at or below the root that hold an images.bin or images.txt, '.' for the root itself.

    Models that may have images in common are one part, since a part is read by one process.
    """
    folders = (folder for folder, files in base.walk(root) if {"images.bin", "images.txt"} & set(files))
    found = [folder for folder in folders if fnmatchcase(folder, options.models)]
    groups = defaultdict(list)
    for model in _whole_models(root, natsort.natsorted(found), options):
        groups[_place_of_images(root, model, options)].append(model)
    return [SEPARATOR.join(models) for models in groups.values()]


def _place_of_images(root: Path, model: str, options: Options) -> str:
    """The nearest folder, from the model's upwards, that is called `--images` or contains images."""
    for parent in (PurePosixPath(model), *PurePosixPath(model).parents):
        if (named := root / parent / options.images).is_dir():
            return os.path.realpath(named)
        if base.images_in(root / parent):
            return os.path.realpath(root / parent)
    return ""


def colmap(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The chains of models, without images of an earlier model; none if the images are not found, which is logged.

    The scene is the folder of the images, or that of an earlier model with some of the same images.
    """
    scenes: dict[str, str] = {}  # of the images of the earlier models
    for each in part.split(SEPARATOR):
        model = _unless_broken(partial(read_model, coordinates=options.sparse_depth), root / each, options)
        if model is None or (images := _find_images(model, root, each, options)) is None:
            continue
        files = [os.path.join(os.path.realpath(root / images), name) for name in model.names]
        new = np.array([file not in scenes for file in files])
        if not new.all():
            log.warning("%d of %d images of '%s' are in an earlier COLMAP model", (~new).sum(), len(new), root / each)
        if not new.any():
            continue
        folder = os.path.commonpath({f"{images}/{name}".rpartition("/")[0] for name in model.names})
        scene = next((scenes[file] for file in files if file in scenes), os.path.normpath(folder))
        found = list(_colmap_sequences(root, each, images, model.select(new), options, scene))
        if found:
            scenes |= dict.fromkeys(files, scene)
        yield from found


def _colmap_sequences(
    root: Path, part: str, images: str, model: Model, options: Options, scene: str
) -> Iterator[SequenceRecord]:
    maps = PurePosixPath(images).parent / "stereo/depth_maps"  # of the workspace of `colmap image_undistorter`

    def depth(name: str) -> str:
        path = f"{maps}/{name}.geometric.bin"
        return path if (root / path).is_file() else ""

    name, z = base.root_name(root) if part == "." else part, DepthFormat("colmap")  # as MegaDepth's
    if not options.sparse_depth:
        yield from _sequences(root, name, images, model, options, options.chain, depth, z, scene)
        return
    write, z = sparse.sparse_depth(root, name, images, model, options), DepthFormat("npz")
    found = _sequences(root, name, images, model, options, options.chain, write, z, scene)
    yield from sparse.below_common_root(found, root, options)


def _find_images(model: Model, root: Path, part: str, options: Options) -> str | None:
    """The first folder `--images`, from the model's folder upwards, that contains any of its images."""
    folder = PurePosixPath(part)
    for parent in (folder, *folder.parents):
        for candidate in (parent / options.images, parent):
            if any((root / candidate / name).is_file() for name in model.names):
                return candidate.as_posix()
    log.warning(
        "skipped: no image of the COLMAP model in '%s' is in a folder '%s' next to or above it; name it with --images",
        root / part, options.images,
    )  # fmt: skip
    return None


def _whole_models(root: Path, parts: Iterable[str], options: Options) -> list[str]:
    """The parts that hold a complete model, by their file names only, so that errors come before hours of work."""
    return [part for part in parts if _unless_broken(find_format, root / part, options)]


def _unless_broken(read: Callable[[Path], T], folder: Path, options: Options) -> T | None:
    """The result of reading, or None after an error with `--broken skip`."""
    try:
        return read(folder)
    except DataError as error:
        if options.broken == "stop":
            raise DataError(f"{error} (--broken skip skips such models)") from error
        log.warning("skipped: %s", error)
        return None


def _sequences(
    root: Path, part: str, images: str, model: Model, options: Options, chain: str,
    depth: Callable[[str], str] | None = None, depth_format: DepthFormat | None = None, scene: str | None = None,
) -> Iterator[SequenceRecord]:  # fmt: skip
    """Chains of a model by the paper's rules, or what the released scripts do instead.

    `part` is the prefix of their names, `images` the folder of the images below the root, `chain` "overlap" (MegaDepth)
    or "angle" (MegaScenes, whose released script takes whole models); `depth` returns the path of an image's depth map,
    "" if there is none; `scene` is that of the sequences, None: `part`.
    """
    frames = [name if images == "." else f"{images}/{name}" for name in model.names]
    present = np.array([bool(path) for path in base.existing(root, frames) or [""] * len(frames)])
    if not present.all():
        log.warning("%d of %d images of the COLMAP model are not in %s", (~present).sum(), len(present), root / images)
    nearest = chain == "overlap" and options.rule == "released"
    if not nearest:  # the released script draws its anchors from all images
        model = model.select(present)
        frames = [frame for frame, exists in zip(frames, present, strict=True) if exists]
    if chain == "angle" and options.rule == "released":
        enough = len(frames) >= (options.min_frames or RELEASED_MIN_IMAGES)
        found = [np.arange(len(frames))] if enough else []
    else:
        overlap = count_shared(model.images, model.points, len(frames))
        if nearest:
            found = rules.nearest_of_anchor(overlap, options.rng(part), options.sequences, options.length, present)
        elif chain == "overlap":
            found = rules.overlap_chains(overlap, options.rng(part), options.sequences, options.length)
            found = [rows for rows in found if len(rows) >= (options.min_frames or SHORTEST)]
        else:
            rotations, least = model.poses[:, :3, :3], options.min_frames or rules.MIN_VIEWS
            found = rules.angle_chains(overlap, rotations, least, options.min_overlap, options.min_angle)

    whole = SequenceRecord(part, frames, scene=scene)
    listed = depth is not None and options.depth
    if found and (options.poses or listed):
        # COLMAP ignores the EXIF orientation (its issue 2104), decoders do not: depth maps of turned images do not fit.
        poses, intrinsics = near_origin(model.poses).astype(np.float32), model.intrinsics.astype(np.float32)
        depths = [""] * len(frames)
        for i in np.unique(np.concatenate(found)).tolist():
            poses[i], intrinsics[i], turned = upright(root / frames[i], poses[i], intrinsics[i])
            if depth is not None and listed and not turned:
                depths[i] = depth(model.names[i])
        if options.poses:
            whole = whole._replace(poses=poses, intrinsics=intrinsics)
        if listed:
            whole = whole._replace(depths=depths, depth_format=depth_format)
    for number, rows in enumerate(found):
        yield whole.select(rows, f"{part}/{number:03d}")


def near_origin(poses: np.ndarray) -> np.ndarray:
    """Poses (n, 4, 4) of a world whose origin is in the middle of the cameras, if that is too far away for float32."""
    if not len(poses):
        return poses
    middle = np.median(-poses[:, :3, :3].swapaxes(1, 2) @ poses[:, :3, 3:], axis=0)  # whatever single cameras do
    if not np.abs(middle).max() > FAR:
        return poses
    moved = poses.copy()
    moved[:, :3, 3:] += poses[:, :3, :3] @ middle
    return moved


OVERLAP_OPTIONS = {
    "sequences": Option(rules.CHAINS_PER_SCENE, "sequences drawn per scene", min=1),
    "length": Option(rules.CHAIN_LENGTH, "most images of a sequence", min=2),
}
ANGLE_OPTIONS = {
    "min_overlap": Option(rules.MIN_OVERLAP, "least overlap of consecutive images", min=0),
    "min_angle": Option(rules.MIN_ANGLE, "least rotation between consecutive images, in degrees", min=0),
}
BROKEN = {"broken": Option("stop", "at a model that cannot be read", choices=("stop", "skip"))}
FROM_LISTS = {
    "scenes": Option("", "text file of the scenes to take, one a line, such as the released training list"),
    "exclude": base.EXCLUDE["exclude"]._replace(
        help="scenes to skip, separated by commas; 0015,0022 are those of MegaDepth-1500"
    ),
}
MIN_FRAMES = Option(None, "skip shorter sequences (default 24; released 12)", type=int, min=1)
COLMAP_OPTIONS = {
    "chain": Option("overlap", "the rule that forms sequences", choices=("overlap", "angle")),
    "images": Option("images", "folder of the images, relative to the model's folder or one above it"),
    "models": Option("*", "pattern of the models' folders, such as '*/sparse/0'"),
    "min_frames": MIN_FRAMES._replace(help="skip shorter sequences (default 2; angle 24, released 12)"),
    "sparse_depth": Option(False, "write depth of the 3-D points next to FILE instead of listing dense maps"),
}

BUILDERS = {
    "megadepth": Builder(
        layout=f"{MEGADEPTH}/<scene>/{{images,{MEGADEPTH_MODEL}}}; optional: {MEGADEPTH_DEPTHS.format('<scene>', '*')}",
        paper="1,000 sequences per scene: a random anchor, then always the image of most overlap with the last",
        released="a random anchor and its 255 images of most overlap, even if 0",
        parts=megadepth_parts,
        sequences=megadepth,
        options={**OVERLAP_OPTIONS, **base.MIN_FRAMES, **FROM_LISTS, **BROKEN, **base.POSES, **base.DEPTH},
    ),
    "megascenes": Builder(
        layout=f"{MEGASCENES}/<001>/<234>/colmap/<n>/{{cameras,images,points3D}}.bin and "
        f"{MEGASCENES_IMAGES}/<001>/<234>/",
        paper="from the image that sees most points to the unused one of largest overlap x 4 cos(t) (1 - cos(t)), "
        "and so on; at least 24 images",
        released="every model of at least 12 images is a sequence: the chains are written, but never called",
        parts=megascenes_parts,
        sequences=megascenes,
        options={"min_frames": MIN_FRAMES} | ANGLE_OPTIONS | BROKEN | base.POSES,
    ),
    "colmap": Builder(
        layout="any COLMAP models, binary or text, each with a folder of its images next to or above it; "
        "optional: stereo/depth_maps next to the images",
        paper="--chain overlap: as megadepth; --chain angle: as megascenes",
        released="--chain overlap: as megadepth; --chain angle: as megascenes",
        parts=colmap_parts,
        sequences=colmap,
        root=sparse.common_root,
        options=COLMAP_OPTIONS | OVERLAP_OPTIONS | ANGLE_OPTIONS | BROKEN | base.POSES | base.DEPTH,
    ),
}

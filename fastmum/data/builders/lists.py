"""Data sets that come with lists of pairs: MegaDepth's scene information of DKM and RoMa, the lists of Reloc3r."""

import logging
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import natsort
import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Options
from fastmum.data.builders.cameras import from_K
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import reading
from fastmum.data.manifest import SequenceRecord
from fastmum.data.pair_lists import LAYOUTS, list_file, read_list, short_name
from fastmum.data.scene_info import FOLDER, SCENE_INFO, images_of, read_scene, scene_file

log = logging.getLogger(__name__)

# RoMa's training leaves out LoFTR's test scenes, scenes that LoFTR ignores, and those of the Image Matching Challenge.
LEFT_OUT = frozenset(
    {
        "0015", "0022", "0121", "0133", "0168", "0178", "0229", "0349", "0412", "0430", "0443", "1001", "5014", "5015",
        "5016", "0008", "0019", "0021", "0024", "0025", "0032", "0063", "1589",
    }
)  # fmt: skip


def scenes(root: Path, options: Options) -> list[str]:
    """The scenes of the folder that RoMa trains on, without those of `--exclude`."""
    names = [name.removesuffix(".npy") for name in base.names_in(root / FOLDER) if name.endswith(".npy")]
    return base.without_excluded(sorted(set(names) - LEFT_OUT), options)


def scene(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The images of a scene that have depth."""
    file = scene_file(root, part)
    content = read_scene(file)
    with reading(file, "scene information"):
        numbers = images_of(content)
        frames, depths = ([str(content[key][i]) for i in numbers] for key in ("image_paths", "depth_paths"))
        poses = np.stack([np.asarray(content["poses"][i], np.float32).reshape(4, 4) for i in numbers]).reshape(-1, 4, 4)
        K = np.stack([np.asarray(content["intrinsics"][i], np.float64).reshape(3, 3) for i in numbers])
        intrinsics = K[:, [0, 1, 0, 1], [0, 1, 2, 2]].astype(np.float32)
        record = SequenceRecord(part, frames, poses, intrinsics, depths=depths, depth_format=DepthFormat("hdf5"))
    yield from base.whole(record, options)


def lists(name: str, root: Path, options: Options) -> list[str]:
    """The list of pairs, which is one part."""
    return [LAYOUTS[name].name] if list_file(name, root).is_file() else []


def listed_images(name: str, root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The images of a list that exist, a sequence for each folder."""
    listed, folders = read_list(name, root), defaultdict[str, list[int]](list)
    short = map(short_name, listed.images)
    found = base.existing(root, listed.images) or base.existing(root, short) or [""] * len(listed.images)
    for number in (i for i, path in enumerate(found) if path):
        folders[found[number].rpartition("/")[0]].append(number)
    if absent := found.count(""):
        log.warning("%d of %d images of '%s' do not exist", absent, len(found), list_file(name, root))
    kept = set(base.without_excluded(sorted({listed.scene_of(folder) for folder in folders}), options))
    for folder in natsort.natsorted(folder for folder in folders if listed.scene_of(folder) in kept):
        numbers = natsort.natsorted(folders[folder], key=found.__getitem__)
        poses, K = zip(*(listed.camera(number) for number in numbers), strict=True)
        frames, intrinsics = [found[number] for number in numbers], np.stack([from_K(each) for each in K])
        record = SequenceRecord(folder, frames, np.stack(poses).astype(np.float32), intrinsics)
        yield from base.whole(record._replace(scene=listed.scene_of(folder)), options)


# Files beside a list, and images that it leaves out.
LISTED = {
    "megadepth_dust3r": ("<scene>/<n>/*.{jpg,npz} as DUSt3R prepares them", ", without scenes 0015 and 0022"),
    "blendedmvs_dust3r": ("<scene>/*.{jpg,npz} as DUSt3R prepares them", ", without every tenth scene, the test set"),
    "realestate10k_pairs": ("images/", ""),
    "dl3dv_pairs": ("1K/<scene>/, or what the list names", ""),
}

BUILDERS = {
    SCENE_INFO: Builder(
        layout=f"{FOLDER}/<scene>.npy and the images and depth maps that they name (DKM, RoMa)",
        paper="all images of a scene; pairs and overlaps are read from its file",
        parts=scenes,
        sequences=scene,
        options=base.MIN_FRAMES | base.EXCLUDE,
    ),
    **{
        name: Builder(
            layout=f"{LAYOUTS[name].name} (not in an archive), Reloc3r's list of pairs, and {files}",
            paper=f"the images of the list, a sequence for each folder{without}; pairs are read from the list",
            parts=partial(lists, name),
            sequences=partial(listed_images, name),
            options=base.MIN_FRAMES | base.EXCLUDE,
        )
        for name, (files, without) in LISTED.items()
    },
}

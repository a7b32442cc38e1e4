"""Lists of pairs that Reloc3r trains on: MegaDepth and BlendedMVS as DUSt3R prepares them, RealEstate10K, DL3DV.

A list is one file in the root of the data set. Builders take the images that it names; the pairs are read from it again
when training starts.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmum.data.arrays import read_archive, read_pickle
from fastmum.data.errors import DataError, reading
from fastmum.data.manifest import Manifest, Manifests
from fastmum.data.store import Place, StoredPath, is_url, join

TEST_SCENES = ("0015", "0022")  # how the names of MegaDepth-1500's begin
HALF_PIXEL = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])  # DUSt3R's pixel centres are integers
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
WHAT = "a list of pairs"

Camera = tuple[np.ndarray, np.ndarray]  # camera_from_world (4, 4) with OpenCV axes, K (3, 3)


class PairList(NamedTuple):
    """The images of a list, each once, and its pairs."""

    images: list[str]  # paths below the root
    pairs: np.ndarray  # (N, 2) int64, numbers of images
    camera: Callable[[int], Camera]  # of the image of a number; DataError that names the file
    scene_of: Callable[[str], str] = str  # the scene of a folder of images


def short_name(path: str) -> str:
    """`x.jpg` of `x.jpg.jpg`, `x.npz` of `x.jpg.npz`: files of `megadepth_dust3r` in MuM's fork of Reloc3r."""
    return re.sub(r"\.(?:jpg|png|JPG)(\.\w+)$", r"\1", path)


class Layout(NamedTuple):
    """The file of a list, and what reads it."""

    name: str  # below the root
    read: Callable[[Path, Path], PairList]  # takes the file and the root; DataError that names the file


def read_list(builder: str, root: Path) -> PairList:
    """The list of a builder in `LAYOUTS`; DataError: it cannot be read."""
    return LAYOUTS[builder].read(list_file(builder, root), root)


def list_file(builder: str, root: Path) -> Path:
    """The file of a list, which may not exist; archives are not searched for it."""
    path = join(root, LAYOUTS[builder].name)
    return StoredPath.at(path, Place(path)) if is_url(path) else Path(path)


@lru_cache(maxsize=8)  # training and held-out pairs are of the same list
def rows_of_list(manifests: Manifests, dataset: str) -> np.ndarray | None:
    """Pairs of rows (N, 2) int64 of a data set; None if one of its manifests has no list.

    Pairs of images that a manifest lacks are left out. DataError: a list cannot be read, or all its pairs are left out.
    """
    rows, first = list[np.ndarray](), 0
    for part in manifests.parts:
        if dataset in part.datasets:
            if part.metadata.get("builder") not in LAYOUTS:
                return None
            rows.append(first + _rows(part))
        first += part.num_frames
    return np.concatenate(rows)


def _rows(part: Manifest) -> np.ndarray:
    builder = str(part.metadata["builder"])
    listed = read_list(builder, part.root)
    row_of = {path: row for row, path in enumerate(part.paths("path", np.arange(part.num_frames)))}
    rows = [row_of.get(path, row_of.get(short_name(path), -1)) for path in listed.images]
    rows = np.array(rows, np.int64)[listed.pairs]
    rows = rows[(rows >= 0).all(1)]
    if not len(rows):
        file = list_file(builder, part.root)
        raise DataError(f"no pair of '{file}' has both images in the manifest '{part.path}': build it again")
    return rows


def _megadepth(file: Path, root: Path) -> PairList:
    held = read_archive(file, ("scenes", "images", "pairs"))
    with reading(file, WHAT):
        scenes, names, listed = held["scenes"].astype(str), held["images"].astype(str), held["pairs"]
        trained = np.array([not scene.startswith(TEST_SCENES) for scene in scenes], bool)
        listed = listed[trained[_indices(listed["scene_id"], len(scenes))]]
        folders = ["{}/{}".format(*scene.split()) for scene in scenes]
        columns = (_indices(listed[key], len(names)) for key in ("im1_id", "im2_id"))
        ends = zip(listed["scene_id"].tolist(), *(column.tolist() for column in columns), strict=True)
        images, pairs, _ = _numbered(f"{folders[scene]}/{names[i]}" for scene, *pair in ends for i in pair)

    def camera(number: int) -> Camera:
        name = f"{images[number]}.npz"
        files = [root / name, root / short_name(name)]
        file = next((each for each in files if each.is_file()), files[0])
        held = read_archive(file, ("intrinsics", "cam2world"))
        with reading(file, "a camera"):
            return np.linalg.inv(_matrix(held["cam2world"], 4)), _matrix(held["intrinsics"], 3) + HALF_PIXEL

    return PairList([f"{image}.jpg" for image in images], pairs, camera, lambda folder: folder.partition("/")[0])


def _blendedmvs(file: Path, root: Path) -> PairList:
    keys = ("seq_high", "seq_low", "img1", "img2")
    held = read_archive(file, keys)
    with reading(file, WHAT):
        trained = held["seq_low"] % 10 > 0  # the others are the test set
        lines = zip(*(_indices(held[key][trained]).tolist() for key in keys), strict=True)
        images, pairs, _ = _numbered(f"{high:08x}{low:016x}/{i:08d}" for high, low, *pair in lines for i in pair)

    def camera(number: int) -> Camera:
        file = root / f"{images[number]}.npz"
        held, pose = read_archive(file, ("intrinsics", "R_cam2world", "t_cam2world")), np.eye(4)
        with reading(file, "a camera"):
            pose[:3, :3], pose[:3, 3] = _matrix(held["R_cam2world"], 3), held["t_cam2world"].reshape(3)
            return np.linalg.inv(pose), _matrix(held["intrinsics"], 3) + HALF_PIXEL

    return PairList([f"{image}.jpg" for image in images], pairs, camera)


def _realestate10k(file: Path, root: Path) -> PairList:
    listed = read_archive(file, ("img_pairs",))["img_pairs"]
    with reading(file, WHAT):
        names = (str(name) for pair in listed.reshape(-1, 2).tolist() for name in pair)
        images, pairs, first = _numbered(f"images/{name}" for name in names)
    held: dict[str, np.ndarray] = {}  # only builders need the cameras

    def camera(number: int) -> Camera:
        if not held:
            held.update(read_archive(file, ("camera_params", "w2c")))
        with reading(file, WHAT):
            pair, side = divmod(int(first[number]), 2)
            camera_from_world = np.eye(4)
            camera_from_world[:3] = np.asarray(held["w2c"][pair, side], np.float64)[:3]
            return camera_from_world, _matrix(held["camera_params"][pair, side], 3)

    return PairList(images, pairs, camera)


def _dl3dv(file: Path, root: Path) -> PairList:
    listed = read_pickle(file)
    with reading(file, WHAT):
        # Reloc3r adds the 1K, MuM's fork reads it from the list.
        folders = [pair[0] if "/" in pair[0] else f"1K/{pair[0]}" for pair in listed]
        ends = zip(folders, listed, strict=True)
        images, pairs, first = _numbered(f"{folder}/{name}" for folder, pair in ends for name in pair[3:5])

    def camera(number: int) -> Camera:
        pair, side = divmod(int(first[number]), 2)
        with reading(file, WHAT):
            # Reloc3r also turns the axes of the world, which no relative pose depends on.
            return np.linalg.inv(_matrix(listed[pair][5 + side], 4) @ OPENGL), _matrix(listed[pair][7], 3)

    return PairList(images, pairs, camera)


def _numbered(paths: Iterable[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Images once each, pairs (N, 2) of their numbers, and where each image comes first, of paths pair by pair."""
    number: dict[str, int] = {}
    flat = np.fromiter((number.setdefault(path, len(number)) for path in paths), np.int64)
    return list(number), flat.reshape(-1, 2), np.unique(flat, return_index=True)[1]


def _indices(numbers: np.ndarray, count: int | None = None) -> np.ndarray:
    """The numbers, integers; ValueError: one is negative, or not below `count`."""
    if numbers.dtype.kind not in "iu" or (numbers < 0).any() or (count is not None and (numbers >= count).any()):
        raise ValueError("a number is negative, too large or no integer")
    return numbers


def _matrix(values: object, side: int) -> np.ndarray:
    """A matrix (side, side), float64; ValueError: it is of another shape."""
    return np.asarray(values, np.float64).reshape(side, side)


# By the name of the builder.
LAYOUTS = {
    "megadepth_dust3r": Layout("all_metadata.npz", _megadepth),
    "blendedmvs_dust3r": Layout("blendedmvs_pairs.npy", _blendedmvs),
    "realestate10k_pairs": Layout("train_metadata_pairs.npz", _realestate10k),
    "dl3dv_pairs": Layout("metadata_train.pkl", _dl3dv),
}

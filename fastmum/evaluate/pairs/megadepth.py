"""MegaDepth-1500 in the layouts of LoFTR, of DKM and RoMa, and of Reloc3r.

Images and depth are under `Undistorted_SfM/` and `phoenix/`, in the root or in its `train/` or `test/`. Files of scene
information list the pairs and the cameras:

- LoFTR: `0015_0.1_0.3.npz` and its four siblings of scenes 0015 and 0022, in the root or in
  `megadepth_test_1500_scene_info/`; for training `index/scene_info_0.1_0.7/<scene>_*.npz`. Keys: image_paths,
  depth_paths, intrinsics, poses (world to camera), pair_infos ((i, j), overlap, central matches).
- DKM and RoMa: `prep_scene_info/<scene>.npy`. The same, but pairs (N, 2) and overlaps (N,).

Reloc3r has no depth: `megadepth_test_pairs.txt` has two images a line, `megadepth_meta_test.npz` for each a dictionary
of intrinsic and pose (world to camera). Images are below the root.
"""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fastmum.data.builders.lists import LEFT_OUT
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError, reading
from fastmum.data.pair_lists import TEST_SCENES
from fastmum.data.samples import Frame
from fastmum.evaluate.pairs.pair import Pair, PairSet, read_archive, rigid, some, square

log = logging.getLogger(__name__)

MIN_OVERLAP = 0.01  # of training pairs, as in RoMa's training
TRAIN_PAIRS = 50  # drawn from each file, which may list hundreds of thousands
TEST_PAIRS = 1500  # drawn from DKM's files, which list more, if LoFTR's are absent
MATCHBENCH_PAIRS = 1000  # drawn by the protocol matchbench from all that DKM's files list, else from LoFTR's

RELOC3R, RELOC3R_CAMERAS = "megadepth_test_pairs.txt", "megadepth_meta_test.npz"
_LOFTR_TEST = ("", "megadepth_test_1500_scene_info", "index/megadepth_test_1500_scene_info")
_LOFTR_TRAIN = ("index/scene_info_0.1_0.7", "scene_info_0.1_0.7")
_IMAGE_ROOTS = ("", "test", "train", "..")
NO_TRAINING = (
    f"has no pairs of other scenes than {' and '.join(TEST_SCENES)} to train on (prep_scene_info/*.npy or "
    "index/scene_info_0.1_0.7/*.npz); --train-data names another set"
)
NO_TEST = (
    "holds no MegaDepth-1500: neither 0015_0.1_0.3.npz and its siblings (also in megadepth_test_1500_scene_info/) nor "
    f"prep_scene_info/0015.npy nor {RELOC3R}"
)


def from_root(root: Path, part: str) -> PairSet:
    """The 1,500 pairs for "test" and "all", 1,000 for "matchbench", or pairs of all other scenes for "train".

    Without LoFTR's and Reloc3r's files the 1,500 are random ones of DKM's, and without DKM's the 1,000 are of LoFTR's:
    sets of another name.
    """
    files = information_files(root, part)
    if files and files[0].name == RELOC3R:
        return PairSet("megadepth", _reloc3r(files[0]))
    if not files:
        raise DataError(f"'{root}' {NO_TRAINING if part == 'train' else NO_TEST}")
    pairs = [pair for file in files for pair in _pairs(file, root, part)]
    if part == "matchbench":
        pairs = [pairs[i] for i in some(np.arange(len(pairs)), MATCHBENCH_PAIRS)]
    lists = "MegaDepth-1500's list (0015_0.1_0.3.npz and its siblings)", "prep_scene_info/"
    missing, taken = lists[::-1] if part == "matchbench" else lists
    other = part != "train" and (files[0].suffix == ".npy") != (part == "matchbench")
    if other:
        log.warning("'%s' lacks %s, so random pairs of %s are drawn, not those of the paper", root, missing, taken)
    return PairSet("megadepth_random" if other else "megadepth", pairs, origin="megadepth")


def information_files(root: Path, part: str) -> list[Path]:
    """Files of one kind, none in a folder of another layout: LoFTR's, Reloc3r's or DKM's, the first for matchbench."""
    if part != "train":
        kinds = [
            sorted(file for scene in TEST_SCENES for file in (root / folder).glob(f"{scene}_*.npz"))
            for folder in _LOFTR_TEST
        ]
        kinds.append([f for f in (root / RELOC3R,) if f.is_file()])
        kinds.append([f for scene in TEST_SCENES if (f := root / "prep_scene_info" / f"{scene}.npy").is_file()])
        return next(filter(None, [kinds[-1], *kinds] if part == "matchbench" else kinds), [])
    for pattern in (*(f"{folder}/*.npz" for folder in _LOFTR_TRAIN), "prep_scene_info/*.npy"):
        found = sorted(file for file in root.glob(pattern) if file.stem.partition("_")[0] not in LEFT_OUT)
        if found:
            return found
    return []


def _pairs(file: Path, root: Path, part: str) -> list[Pair]:
    information = read_archive(file)
    with reading(file, "scene information of MegaDepth"):
        indices, overlaps = _listed(information)
        if part == "train":
            indices = some(indices[overlaps > MIN_OVERLAP], TRAIN_PAIRS)
        elif part == "matchbench":
            indices = indices[overlaps > 0]
        elif file.suffix == ".npy":
            indices = some(indices, TEST_PAIRS // len(TEST_SCENES))
        folder = _image_root(information["image_paths"], root, file)

        @cache
        def frame(index: int) -> Frame:
            image, depth = (str(information[key][index]) for key in ("image_paths", "depth_paths"))
            K = square(information["intrinsics"][index], 3, f"intrinsics {index} in '{file}'")
            pose = rigid(information["poses"][index], f"pose {index} in '{file}'")
            return Frame(image, folder / image, K, pose, folder / depth, DepthFormat("hdf5"))

        scene = file.stem.partition("_")[0]
        return [Pair(f"{file.stem}/{i}-{j}", scene, frame(i), frame(j)) for i, j in indices.tolist()]


def _reloc3r(file: Path) -> list[Pair]:
    with reading(file, "a list of MegaDepth's pairs"):
        pairs = [(a, b) for a, b in map(str.split, file.read_text(encoding="utf-8-sig").strip().splitlines())]
    root, archive = file.parent, file.with_name(RELOC3R_CAMERAS)
    cameras = read_archive(archive, dict.fromkeys(name for pair in pairs for name in pair))

    @cache
    def frame(name: str) -> Frame:
        with reading(archive, "cameras of MegaDepth"):
            camera = cameras[name].item()
            K = square(camera["intrinsic"], 3, f"intrinsics of '{name}' in '{archive}'")
            return Frame(name, root / name, K, rigid(camera["pose"], f"pose of '{name}' in '{archive}'"))

    return [Pair(f"{a}-{b}", a.rpartition("/")[0], frame(a), frame(b)) for a, b in pairs]


def _listed(information: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Image numbers (N, 2) and overlaps (N,) of the pairs."""
    if "pair_infos" in information:
        listed = information["pair_infos"]
        indices, overlaps = [tuple(each[0]) for each in listed], [float(each[1]) for each in listed]
    else:
        indices, overlaps = information["pairs"], information["overlaps"]
    return np.asarray(indices, np.int64).reshape(-1, 2), np.asarray(overlaps, np.float64)


def _image_root(image_paths: Any, root: Path, file: Path) -> Path:
    """The folder that the paths of a file are relative to."""
    first = next((str(path) for path in image_paths if path is not None), None)
    if first is None:
        raise DataError(f"'{file}' names no pictures")
    for folder in _IMAGE_ROOTS:
        if (root / folder / first).is_file():
            return root / folder
    raise DataError(f"'{first}', named in '{file}', is not under '{root}', nor in its test/ or train/")

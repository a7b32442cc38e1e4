"""ScanNet-1500 (SuperGlue's split) in the layouts of LoFTR, DKM and RoMa.

`test.npz` (in the root, `scannet_test_1500/` or `index/scannet_test_1500/`) has `name` (N, 4): scene, sub-scene and the
two frames, and may have `rel_pose` (N, 12). Scenes are in the root, `scans_test/`, `test/` or `scannet_test_1500/`:
`scene0707_00/color/15.jpg`, `depth/15.png` (16-bit millimetres), `pose/15.txt` (camera to world),
`intrinsic/intrinsic_color.txt`; LoFTR has the depth intrinsics of all scenes in `intrinsics.npz` next to `test.npz`.
Training pairs: `scannet_indices/*.npz` or `index/scene_data/train/*.npz` with `name` and `score`, scenes in
`scans/scans_train/` or `train/`.
"""

import logging
from functools import cache
from pathlib import Path

import numpy as np

from fastmum.data.builders.cameras import scannet_intrinsics
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError, reading
from fastmum.data.samples import Frame, image_size
from fastmum.evaluate.pairs.pair import Pair, PairSet, read_archive, read_table, rigid, some, square

log = logging.getLogger(__name__)

DEPTH = DepthFormat("png16", 1e-3)
MIN_OVERLAP = 0.4  # score of training pairs, as in LoFTR's training
TRAIN_PAIRS = 10  # drawn from each of 1,513 scenes, since every pose is a file
EVERY = 10  # frames between those of training pairs, as in RoMa's training

TEST_FILES = ("test.npz", "scannet_test_1500/test.npz", "index/scannet_test_1500/test.npz")
_TRAIN = ("scannet_indices/*.npz", "index/scene_data/train/*.npz")
_TEST_SCANS = ("scans_test", "test", "", "scannet_test_1500", "scans/scans_test")
_TRAIN_SCANS = ("scans/scans_train", "train", "scans")


def from_root(root: Path, part: str) -> PairSet:
    """The 1,500 pairs for "test" and "all", or training pairs."""
    if part == "train":
        indices = next((found for pattern in _TRAIN if (found := sorted(root.glob(pattern)))), [])
        if not indices:
            raise DataError(f"'{root}' has no training pairs ({' or '.join(_TRAIN)}); --train-data names another set")
        scans = _Scans(root, _TRAIN_SCANS, None)
    else:
        indices = [root / name for name in TEST_FILES if (root / name).is_file()][:1]
        if not indices:
            raise DataError(f"'{root}' holds no ScanNet-1500: none of {', '.join(TEST_FILES)} is there")
        scans = _Scans(root, _TEST_SCANS, indices[0].with_name("intrinsics.npz"))
    pairs = [pair for file in indices for pair in _pairs(file, scans, part)]
    return PairSet("scannet", pairs, origin="scannet")


class _Scans:
    """The scenes in some folders of a root, with the intrinsics of LoFTR's file if it exists."""

    def __init__(self, root: Path, folders: tuple[str, ...], intrinsics: Path | None) -> None:
        self._root, self._folders, self._intrinsics = root, folders, intrinsics
        self._shared = read_archive(intrinsics) if intrinsics is not None and intrinsics.is_file() else {}
        self._folder, self._cameras = cache(self._find_folder), cache(self._find_cameras)

    def frame(self, scene: str, index: int) -> Frame | None:
        """A frame; None if tracking was lost."""
        folder = self._folder(scene)
        image, pose = folder / "color" / f"{index}.jpg", folder / "pose" / f"{index}.txt"
        world_from_camera = read_table(pose, (4, 4))
        if not np.isfinite(world_from_camera).all():
            return None
        camera_from_world = np.linalg.inv(rigid(world_from_camera, f"'{pose}'"))
        K = scannet_intrinsics(*self._cameras(scene), image_size(image))
        return Frame(f"{scene}/{index}", image, K, camera_from_world, folder / "depth" / f"{index}.png", DEPTH)

    def _find_folder(self, scene: str) -> Path:
        found = next((place for each in self._folders if (place := self._root / each / scene).is_dir()), None)
        if found is None:
            looked = ", ".join(filter(None, self._folders))
            raise DataError(f"'{scene}' is neither in '{self._root}' nor below it in {looked}")
        return found

    def _find_cameras(self, scene: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Intrinsics of the colour and of the depth camera, none or one or two of each."""
        folder = self._folder(scene) / "intrinsic"
        files = [folder / f"intrinsic_{kind}.txt" for kind in ("color", "depth")]
        colour, depth = ([square(read_table(file, (3, 3)), 3, f"'{file}'")] if file.is_file() else [] for file in files)
        if scene in self._shared:
            depth.append(square(self._shared[scene].reshape(3, 3), 3, f"{scene} in '{self._intrinsics}'"))
        if not (colour or depth):
            raise DataError(f"'{scene}' has no intrinsics: neither '{files[0]}' nor intrinsics.npz is there")
        return colour, depth


def _pairs(file: Path, scans: _Scans, part: str) -> list[Pair]:
    archive = read_archive(file)
    with reading(file, "a list of ScanNet's pairs"):
        names = np.asarray(archive["name"])
        names = np.stack([names[key] for key in names.dtype.names], 1) if names.dtype.names else names.reshape(-1, 4)
        names = names.astype(np.int64)
        if part == "train":
            usable = (np.asarray(archive["score"]) > MIN_OVERLAP) & (names[:, 2:] % EVERY == 0).all(1)
            names = some(names[usable], TRAIN_PAIRS)
    pairs = []
    for number, sub, i, j in names.tolist():
        scene = f"scene{number:04d}_{sub:02d}"
        a, b = scans.frame(scene, i), scans.frame(scene, j)
        if a is not None and b is not None:
            pairs.append(Pair(f"{scene}/{i}-{j}", scene, a, b))
    if len(pairs) < len(names):
        log.warning("%s: %d of %d pairs have no pose and are skipped", file, len(names) - len(pairs), len(names))
    return pairs

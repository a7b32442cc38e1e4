"""ScanNet-1500 (SuperGlue's split) in the layouts of LoFTR, DKM and RoMa.

`test.npz` (in the root, `scannet_test_1500/` or `index/scannet_test_1500/`) has `name` (N, 4): scene, sub-scene and the
two frames, and may have `rel_pose` (N, 12). Scenes lie in the root, `scans_test/`, `test/` or `scannet_test_1500/`:
`scene0707_00/color/15.jpg`, `depth/15.png` (16-bit millimetres), `pose/15.txt` (camera to world),
`intrinsic/intrinsic_color.txt`; LoFTR has the intrinsics of depth for all scenes in `intrinsics.npz` beside `test.npz`.
Training pairs: `scannet_indices/*.npz` or `index/scene_data/train/*.npz` with `name` and `score`, scenes in
`scans/scans_train/` or `train/`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastmum.data.errors import DataError
from fastmum.evaluate.pairs.pair import Frame, Pair, PairSet, relative_pose, some
from fastmum.evaluate.pairs.reading import frame_of, image_size, invertible, read_archive, read_table, square

log = logging.getLogger(__name__)

SIZE = 448
UNIT = 1e-3  # metres a count of depth
MIN_OVERLAP = 0.4  # score of training pairs, as in LoFTR's training
TRAIN_PAIRS = 10  # drawn from each of 1,513 scenes: a pose is a file
EVERY = 10  # of a video's frames in training pairs, as in RoMa's training

_TEST = ("test.npz", "scannet_test_1500/test.npz", "index/scannet_test_1500/test.npz")
_TRAIN = ("scannet_indices/*.npz", "index/scene_data/train/*.npz")
_TEST_SCANS = ("scans_test", "test", "", "scannet_test_1500", "scans/scans_test")
_TRAIN_SCANS = ("scans/scans_train", "train", "scans")


def is_scannet(root: Path) -> bool:
    """Whether a folder holds the pairs of ScanNet-1500."""
    return any((root / name).is_file() for name in _TEST)


def from_root(root: Path, part: str) -> PairSet:
    """The 1,500 pairs, or training pairs.

    Args:
        root: the folder.
        part: "train", or "test" and "all", which here are the same.

    Raises:
        DataError: nothing of that part is there, or a file that cannot be read.
    """
    if part == "train":
        indices = next((found for pattern in _TRAIN if (found := sorted(root.glob(pattern)))), [])
        if not indices:
            raise DataError(f"'{root}' has no training pairs ({' or '.join(_TRAIN)}); --train-data names another set")
        scans = _Scans(root, _TRAIN_SCANS, None)
    else:
        indices = [root / name for name in _TEST if (root / name).is_file()][:1]
        if not indices:
            raise DataError(f"'{root}' holds no ScanNet-1500: none of {', '.join(_TEST)} is there")
        scans = _Scans(root, _TEST_SCANS, indices[0].with_name("intrinsics.npz"))
    pairs = [pair for file in indices for pair in _pairs(file, scans, part)]
    return PairSet("scannet", pairs, SIZE, origin="scannet")


def _pairs(file: Path, scans: _Scans, part: str) -> list[Pair]:
    archive = read_archive(file)
    try:
        names = np.asarray(archive["name"])
        names = np.stack([names[key] for key in names.dtype.names], 1) if names.dtype.names else names.reshape(-1, 4)
        names = names.astype(np.int64)
        if part == "train":
            usable = (np.asarray(archive["score"]) > MIN_OVERLAP) & (names[:, 2:] % EVERY == 0).all(1)
            names = some(names[usable], TRAIN_PAIRS)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"'{file}' is no list of ScanNet's pairs ({error!r} is missing or wrong)") from None
    pairs = []
    for number, sub, i, j in names.tolist():
        scene = f"scene{number:04d}_{sub:02d}"
        poses = [scans.pose(scene, index) for index in (i, j)]
        if all(np.isfinite(pose).all() for pose in poses):  # tracking is lost in some frames
            T_a, T_b = (
                np.linalg.inv(invertible(pose, f"'{scans.pose_file(scene, index)}'"))
                for pose, index in zip(poses, (i, j), strict=True)
            )
            frames = (scans.frame(scene, index) for index in (i, j))
            pairs.append(Pair(f"{scene}/{i}-{j}", scene, *frames, relative_pose(T_a, T_b)))
    if len(pairs) < len(names):
        log.warning("%s: %d of %d pairs have no pose and are passed over", file, len(names) - len(pairs), len(names))
    return pairs


@dataclass
class _Scans:
    """The scenes of a root.

    Args:
        root: of everything.
        folders: below it that scenes may lie in.
        intrinsics: LoFTR's file of intrinsics, if it is there.
    """

    root: Path
    folders: tuple[str, ...]
    intrinsics: Path | None
    _found: dict[str, Path] = field(default_factory=dict)
    _cameras: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _shared: dict[str, np.ndarray] | None = None

    def pose(self, scene: str, index: int) -> np.ndarray:
        """Camera to world, (4, 4); not finite where tracking was lost."""
        return read_table(self.pose_file(scene, index), (4, 4))

    def pose_file(self, scene: str, index: int) -> Path:
        return self._folder(scene) / "pose" / f"{index}.txt"

    def frame(self, scene: str, index: int) -> Frame:
        folder = self._folder(scene)
        image = folder / "color" / f"{index}.jpg"
        return frame_of(f"{scene}/{index}", image, folder / "depth" / f"{index}.png", self._camera(scene, image), UNIT)

    def _folder(self, scene: str) -> Path:
        if scene not in self._found:
            places = [self.root / folder / scene for folder in self.folders]
            found = next((place for place in places if place.is_dir()), None)
            if found is None:
                looked = ", ".join(filter(None, self.folders))
                raise DataError(f"'{scene}' is neither in '{self.root}' nor below it in {looked}")
            self._found[scene] = found
        return self._found[scene]

    def _camera(self, scene: str, image: Path) -> np.ndarray:
        """Intrinsics that fit the picture: releases have pictures in the colour camera's size or in that of depth."""
        width, height = image_size(image)
        if scene not in self._cameras:
            self._cameras[scene] = self._known(scene)
        # A camera's principal point lies near the middle of its pictures.
        return min(self._cameras[scene], key=lambda K: abs(K[0, 2] / width - 0.5) + abs(K[1, 2] / height - 0.5))

    def _known(self, scene: str) -> list[np.ndarray]:
        folder = self._folder(scene) / "intrinsic"
        files = [folder / f"intrinsic_{kind}.txt" for kind in ("color", "depth")]
        cameras = [square(read_table(file, (3, 3)), 3, f"'{file}'") for file in files if file.is_file()]
        if self._shared is None:
            there = self.intrinsics is not None and self.intrinsics.is_file()
            self._shared = read_archive(self.intrinsics) if there else {}
        if scene in self._shared:
            cameras.append(square(self._shared[scene].reshape(3, 3), 3, f"{scene} in '{self.intrinsics}'"))
        if not cameras:
            raise DataError(f"'{scene}' has no intrinsics: neither '{files[0]}' nor intrinsics.npz is there")
        return cameras

"""NAVI, with the pairs and crops of Probe3D.

Layout (v1.0, v1.5): `<object>/wild_set/annotations.json`, `images/000.jpg`, `depth/000.png`. An annotation has
`filename`, `image_size` (height, width) and `camera` with `q` (w, x, y, z), `t` (millimetres) and `focal_length`
(pixels). A depth PNG holds inverse depth: millimetres are 655350 / count, 0 is background.

Probe3D: every fourth image of the wild sets; its partner is another image of the set at most 120 degrees away; both are
cropped to a square around the object.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from fastmum.data.depth import DepthFormat, read_depth
from fastmum.data.errors import DataError, reading
from fastmum.data.samples import Frame, read_rgb
from fastmum.evaluate.pairs.pair import Pair, PairSet, matrix, read_json
from fastmum.geometry import Camera
from fastmum.geometry.camera import intrinsics_matrix
from fastmum.geometry.crop import Box
from fastmum.geometry.metrics import rotation_error

SIZE = 512  # Probe3D's configuration
EVERY, MAX_ANGLE, SEED = 4, 120.0, 8  # images, degrees
INVERSE = 65535 * 10  # millimetres times counts, NAVI's `decode_depth`
MILLIMETRE = 1e-3  # metres


def from_root(root: Path, part: str) -> PairSet:
    """Pairs of images of one object in front of different backgrounds; "all" and "test" are the same."""
    if part == "train":
        raise DataError("NAVI is not trained on here; name another set by --train-data")
    files = sorted(root.glob("*/wild_set/annotations.json"))
    if not files:
        raise DataError(f"'{root}' holds no NAVI: there is no */wild_set/annotations.json")
    rng = np.random.default_rng(SEED)
    pairs = [pair for file in files for pair in _pairs(file, rng)]
    return PairSet("navi", pairs[::EVERY], SIZE, objects=True)


@dataclass(frozen=True, eq=False)
class _ObjectFrame(Frame):
    """An image cropped to the square around its object."""

    whole: Camera = field(kw_only=True)  # camera of the whole image

    def read_image(self) -> Image.Image:
        assert self.file is not None
        image = read_rgb(self.file)
        box, size = self._box
        left, top, right, bottom = (round(e / n * m) for e, n, m in zip(box, 2 * size, 2 * image.size, strict=True))
        return image.crop((left, top, right, bottom))

    def read_camera(self) -> Camera:
        (left, top, right, bottom), size = self._box
        K = self.whole.resized(size).K - [[0, 0, left], [0, 0, top], [0, 0, 0]]
        return Camera(K, self.whole.camera_from_world, (right - left, bottom - top))

    def read_depth(self) -> np.ndarray:
        left, top, right, bottom = self._box[0]
        return self._whole_depth()[top:bottom, left:right]

    def _whole_depth(self) -> np.ndarray:
        assert self.depth is not None
        counts = read_depth(self.depth, DepthFormat("png16"))
        return np.where(counts > 0, INVERSE / np.maximum(counts, 1) * MILLIMETRE, 0).astype(np.float32)

    @cached_property
    def _box(self) -> tuple[Box, tuple[int, int]]:
        """Square around the object within the middle square, pixels of the depth map, and the size of that map."""
        depth = self._whole_depth()
        rows, columns = depth.shape
        side = min(rows, columns)
        corner = np.array([(rows - side) // 2, (columns - side) // 2])
        known = np.argwhere(depth[corner[0] : corner[0] + side, corner[1] : corner[1] + side] > 0)
        if not len(known):
            raise DataError(f"depth '{self.depth}' shows no object")
        first, end = known.min(0), known.max(0) + 1
        square = int((end - first).max())
        top, left = (corner + np.clip((first + end - square) // 2, 0, side - square)).tolist()
        return (left, top, left + square, top + square), (columns, rows)


def _pairs(file: Path, rng: np.random.Generator) -> list[Pair]:
    annotations = read_json(file)
    with reading(file, "an annotation of NAVI"):
        frames = [_frame(annotation, file.parent, f"'{file}'") for annotation in annotations]
    rotations = np.array([frame.whole.camera_from_world[:3, :3] for frame in frames]).reshape(-1, 3, 3)
    pairs = []
    for i, frame in enumerate(frames):
        angles = rotation_error(rotations, rotations[i])
        partners = np.flatnonzero((angles > 0) & (angles <= MAX_ANGLE) & (np.arange(len(frames)) != i))
        if len(partners):
            other = frames[rng.choice(partners)]
            pairs.append(Pair(f"{frame.key}-{Path(other.key).stem}", file.parent.parent.name, frame, other))
    return pairs


def _frame(annotation: dict[str, Any], folder: Path, where: str) -> _ObjectFrame:
    camera, image = annotation["camera"], folder / "images" / annotation["filename"]
    height, width = annotation["image_size"]
    q, focal = matrix(camera["q"], (4,), f"q in {where}"), float(camera["focal_length"])
    if not q.any() or not 0 < focal < np.inf:
        raise DataError(f"'{image.name}' in {where} has q {q.tolist()} and focal_length {focal:g}, neither may be 0")
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_quat(q[[1, 2, 3, 0]]).as_matrix()
    pose[:3, 3] = matrix(camera["t"], (3,), f"t in {where}") * MILLIMETRE
    whole = Camera(intrinsics_matrix(focal, focal, width / 2, height / 2), pose, (width, height))
    depth = folder / "depth" / f"{image.stem}.png"
    key = f"{folder.parent.name}/{image.name}"
    return _ObjectFrame(key, image, None, pose, depth, whole=whole)

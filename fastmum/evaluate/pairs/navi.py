"""NAVI, as Probe3D pairs and crops it.

Layout (v1.0, v1.5): `<object>/wild_set/annotations.json`, `images/000.jpg`, `depth/000.png`. An annotation has
`filename`, `image_size` (height, width) and `camera` with `q` (w, x, y, z), `t` (millimetres) and `focal_length`
(pixels). A depth PNG holds inverse depth: millimetres are 655350 / count, 0 is background.

Probe3D: every fourth picture of the wild sets; its partner is another picture of the set at most 120 degrees away;
both are cut to a square round the object.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastmum.data.errors import DataError
from fastmum.evaluate.pairs.pair import Camera, Frame, Pair, PairSet, relative_pose
from fastmum.evaluate.pairs.reading import clean_depth, matrix, read_depth, read_json, read_rgb

SIZE = 512  # Probe3D's configuration
EVERY = 4
MAX_ANGLE = 120.0  # degrees
SEED = 8
INVERSE = 65535 * 10  # millimetres times counts, NAVI's `decode_depth`
MILLIMETRE = 1e-3  # metres


def is_navi(root: Path) -> bool:
    """Whether a folder holds NAVI."""
    return root.is_dir() and any(root.glob("*/wild_set/annotations.json"))


def from_root(root: Path, part: str) -> PairSet:
    """Pairs of pictures of one object in front of different backgrounds.

    Args:
        root: the folder with a folder for each object.
        part: "all" or "test", which here are the same.

    Raises:
        DataError: no object, a part to train on, or a file that cannot be read.
    """
    if part == "train":
        raise DataError("NAVI is not trained on here; name another set by --train-data")
    files = sorted(root.glob("*/wild_set/annotations.json"))
    if not files:
        raise DataError(f"'{root}' holds no NAVI: there is no */wild_set/annotations.json")
    rng = np.random.default_rng(SEED)
    pairs = [pair for file in files for pair in _pairs(file, rng)]
    return PairSet("navi", pairs[::EVERY], SIZE, objects=True)


class _View(NamedTuple):
    """An annotated picture: its frame, and the rotation and translation of its camera."""

    frame: Frame
    T_44: np.ndarray


def _pairs(file: Path, rng: np.random.Generator) -> list[Pair]:
    folder, name = file.parent, file.parent.parent.name
    try:
        views = [_view(annotation, folder, f"'{file}'") for annotation in read_json(file)]
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"'{file}' is no annotation of NAVI ({error!r} is missing or wrong)") from None
    pairs = []
    for i, view in enumerate(views):
        angles = np.array([_angle(view.T_44, other.T_44) for other in views])
        partners = np.flatnonzero((angles > 0) & (angles <= MAX_ANGLE) & (np.arange(len(views)) != i))
        if len(partners):
            other = views[rng.choice(partners)]
            label = f"{view.frame.key}-{Path(other.frame.key).stem}"
            pairs.append(Pair(label, name, view.frame, other.frame, relative_pose(view.T_44, other.T_44)))
    return pairs


def _view(annotation: dict[str, Any], folder: Path, where: str) -> _View:
    camera, image = annotation["camera"], folder / "images" / annotation["filename"]
    height, width = annotation["image_size"]
    q, focal = matrix(camera["q"], (4,), f"q in {where}"), float(camera["focal_length"])
    if not q.any() or not 0 < focal < np.inf:
        raise DataError(
            f"'{image.name}' in {where} has q {q.tolist()} and focal_length {focal:g}, of which none may be 0"
        )
    T = np.eye(4)
    T[:3, :3] = _rotation(q)
    T[:3, 3] = matrix(camera["t"], (3,), f"t in {where}") * MILLIMETRE
    cut = _Cut(image, folder / "depth" / f"{image.stem}.png", (width, height), focal)
    return _View(Frame(f"{folder.parent.name}/{image.name}", cut.read_image, cut.read_camera, image), T)


@dataclass(frozen=True)
class _Cut:
    """A picture cut to the square round its object.

    Args:
        image, depth: the files.
        size: width and height that the focal length belongs to.
        focal: pixels.
    """

    image: Path
    depth: Path
    size: tuple[int, int]
    focal: float

    def read_image(self) -> Image.Image:
        picture = read_rgb(self.image)
        box = [edge * side for edge, side in zip(self._box(self._depth()), 2 * picture.size, strict=True)]
        return picture.crop([round(edge) for edge in box])

    def read_camera(self) -> Camera:
        depth = self._depth()
        left, top, right, bottom = box = self._box(depth)
        (width, height), (rows, columns) = self.size, depth.shape
        K = np.array([[self.focal / width, 0, 0.5 - left], [0, self.focal / height, 0.5 - top], [0, 0, 1]])
        cut = [round(edge * side) for edge, side in zip(box, 2 * (columns, rows), strict=True)]
        return Camera(np.diag([1 / (right - left), 1 / (bottom - top), 1]) @ K, depth[cut[1] : cut[3], cut[0] : cut[2]])

    def _depth(self) -> np.ndarray:
        counts = read_depth(self.depth)
        with np.errstate(divide="ignore"):
            return clean_depth(INVERSE / counts * MILLIMETRE)

    def _box(self, depth: np.ndarray) -> tuple[float, float, float, float]:
        """Left, top, right and bottom in unit coordinates: square, within the middle square, whole pixels of depth."""
        rows, columns = depth.shape
        side = min(rows, columns)
        corner = np.array([(rows - side) // 2, (columns - side) // 2])
        known = np.argwhere(depth[corner[0] : corner[0] + side, corner[1] : corner[1] + side] > 0)
        if not len(known):
            raise DataError(f"depth '{self.depth}' shows no object")
        first, end = known.min(0), known.max(0) + 1
        square = int((end - first).max())
        top, left = corner + np.clip((first + end - square) // 2, 0, side - square)
        return left / columns, top / rows, (left + square) / columns, (top + square) / rows


def _rotation(q: np.ndarray) -> np.ndarray:
    """The rotation of a quaternion (w, x, y, z), which need not have length 1."""
    w, (x, y, z) = q[0], q[1:]
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 / (q @ q) * (w * cross + cross @ cross)


def _angle(T_a: np.ndarray, T_b: np.ndarray) -> float:
    cosine = (np.trace(T_a[:3, :3] @ T_b[:3, :3].T) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))

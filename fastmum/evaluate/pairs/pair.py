"""Pairs of frames to evaluate on, and readers of their cameras, which raise a `DataError` that names the file.

Images and depth are read when they are needed, so sets of thousands of pairs open fast.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastmum.data.arrays import read_archive as read_archive
from fastmum.data.errors import DataError, reading
from fastmum.data.samples import Frame
from fastmum.files import read_json as load_json
from fastmum.geometry import relative_pose
from fastmum.geometry.warp import Warp, grid_points, true_warp

T = TypeVar("T")
ROUNDING = 1e-2  # of products of a rotation's columns, which a text file may hold with few digits


@dataclass(frozen=True)
class Pair:
    """Two views of one scene: frames of different keys, with poses in the unit of their depths."""

    name: str  # identifies the pair in results
    scene: str  # pairs of one scene are never split between training and test
    a: Frame
    b: Frame

    @property
    def T_b_a(self) -> np.ndarray:
        """Camera a to camera b, (4, 4) float64."""
        assert self.a.camera_from_world is not None
        assert self.b.camera_from_world is not None
        return relative_pose(self.a.camera_from_world, self.b.camera_from_world)

    def reversed(self) -> Self:
        """The same pair from b to a."""
        return replace(self, name=f"{self.name}, reversed", a=self.b, b=self.a)


def pair_warp(pair: Pair, rows: int, columns: int) -> Warp:
    """The true warp of a pair at the centres of a grid on its first image; raises `DataError`."""
    depths, Ks = zip(depth_and_K(pair.a), depth_and_K(pair.b), strict=True)
    return true_warp(grid_points(rows, columns), *depths, *Ks, torch.from_numpy(pair.T_b_a))


def depth_and_K(frame: Frame) -> tuple[Tensor, Tensor]:
    """Depth (h, w) float32 and K (3, 3) float64 in pixels of the depth map."""
    depth, camera = frame.read_depth(), frame.read_camera()
    assert depth is not None, frame
    assert camera is not None, frame
    return torch.from_numpy(depth), torch.from_numpy(camera.resized(depth.shape[::-1]).K)


@dataclass(frozen=True)
class PairSet:
    """At least one pair, to evaluate on or to train a probe on."""

    name: str  # a column of the published tables if there is one
    pairs: list[Pair]
    size: int = 448  # default side in pixels that the images are resized to, as in RoMa's metrics
    objects: bool = False  # each scene is one object in front of changing backgrounds, with depth on the object only
    origin: str = ""  # data set or folder in which scene names are unique; "" if they mean nothing elsewhere
    of: int | None = None  # number of pairs that these are chosen from, if they are not all

    def __post_init__(self) -> None:
        if not self.pairs:
            raise DataError(f"the set '{self.name}' has no pairs")

    def first(self, count: int | None) -> Self:
        """At most `count` pairs, evenly spread over the set and so over its scenes; None for all."""
        picked = evenly(self.pairs, count)
        return self if picked is self.pairs else replace(self, pairs=picked, of=self.of or len(self.pairs))

    def both_ways(self) -> Self:
        """Every pair and its reverse."""
        return replace(self, pairs=[each for pair in self.pairs for each in (pair, pair.reversed())])


def evenly(items: list[T], count: int | None) -> list[T]:
    """At most `count` items, evenly spread over the list; None for all."""
    if count is None or count >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def some(items: np.ndarray, count: int) -> np.ndarray:
    """At most `count` random rows in their order, always the same ones."""
    if len(items) <= count:
        return items
    return items[np.sort(np.random.default_rng(0).choice(len(items), count, replace=False))]


def overlap(train: PairSet, test: PairSet) -> str | None:
    """Description of a scene (of one origin) or an image file that two sets share; None if they share nothing."""
    if train.origin and train.origin == test.origin:
        tested = {pair.scene for pair in test.pairs}
        scene = next((pair.scene for pair in train.pairs if pair.scene in tested), None)
        if scene is not None:
            return f"scene '{scene}'"
    trained_files, tested_files = (
        {frame.file.resolve(): None for pair in each.pairs for frame in (pair.a, pair.b) if frame.file is not None}
        for each in (train, test)
    )
    file = next((file for file in trained_files if file in tested_files), None)
    return None if file is None else f"picture '{file}'"


def read_table(file: Path, shape: tuple[int, int]) -> np.ndarray:
    """The upper left part (rows, columns) of a matrix in a text file, float64."""
    with reading(file, "a table of numbers"):
        table = np.loadtxt(file, dtype=np.float64, ndmin=2, encoding="utf-8-sig")
    if table.shape[0] < shape[0] or table.shape[1] < shape[1]:
        raise DataError(f"'{file}' holds {table.shape} numbers, but at least {shape} are expected")
    return table[: shape[0], : shape[1]]


def read_json(file: Path) -> Any:
    """The content of a JSON file."""
    with reading(file, "JSON"):
        return load_json(file)


def matrix(value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Finite numbers of a shape, float64; the message of the error starts with `what`."""
    expected = f"{' x '.join(map(str, shape))} finite numbers" if shape else "a finite number"
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{what} must be {expected}") from None
    if found.shape != shape or not np.isfinite(found).all():
        raise DataError(f"{what} must be {expected}, but is of shape {found.shape}")
    return found


def square(value: Any, side: int, what: str) -> np.ndarray:
    """A finite invertible matrix (side, side), float64, as intrinsics and poses are; see `matrix` for `what`."""
    found = matrix(value, (side, side), what)
    if np.linalg.matrix_rank(found) < side:
        raise DataError(f"{what} is a singular matrix, which intrinsics and poses never are")
    return found


def rigid(value: Any, what: str) -> np.ndarray:
    """A pose (4, 4), float64: a rotation with a translation; see `matrix` for `what`."""
    found = square(value, 4, what)
    R = found[:3, :3]
    if np.abs(R.T @ R - np.eye(3)).max() > ROUNDING or np.linalg.det(R) < 0 or not np.allclose(found[3], (0, 0, 0, 1)):
        raise DataError(f"{what} is no rotation with a translation: it scales, shears or mirrors")
    return found

"""Pairs of frames to evaluate on. Files are read when they are needed, so sets of thousands of pairs open fast."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastmum.data.errors import DataError
from fastmum.data.samples import Frame
from fastmum.geometry import relative_pose
from fastmum.geometry.warp import Warp, grid_points, true_warp

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """Two views of one scene.

    Args:
        name: identifies the pair in results.
        scene: pairs of one scene are never split between training and test.
        a, b: frames of different keys, with poses in the unit of their depths.
    """

    name: str
    scene: str
    a: Frame
    b: Frame

    @property
    def T_b_a(self) -> np.ndarray:
        """Camera a to camera b, (4, 4) float64."""
        assert self.a.camera_from_world is not None
        assert self.b.camera_from_world is not None
        return relative_pose(self.a.camera_from_world, self.b.camera_from_world)

    def reversed(self) -> Pair:
        """The same pair from b to a."""
        return replace(self, name=f"{self.name}, reversed", a=self.b, b=self.a)


def pair_warp(pair: Pair, rows: int, columns: int) -> Warp:
    """The true warp of a pair at the centres of a grid on its first image.

    Raises:
        DataError: depth or camera cannot be read.
    """
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
    """Pairs to evaluate on, or to train a probe on.

    Args:
        name: of the set; a column of the published tables if there is one.
        pairs: at least one.
        size: default side in pixels that its images are resized to.
        objects: whether each scene is one object in front of changing backgrounds, with depth on the object only.
        origin: data set or folder in which scene names are unique; "" if they mean nothing elsewhere.
    """

    name: str
    pairs: list[Pair]
    size: int
    objects: bool = False
    origin: str = ""

    def __post_init__(self) -> None:
        if not self.pairs:
            raise DataError(f"the set '{self.name}' has no pairs")

    def first(self, count: int | None) -> PairSet:
        """At most `count` pairs, evenly spread over the set and so over its scenes; None for all."""
        picked = evenly(self.pairs, count)
        return self if picked is self.pairs else replace(self, pairs=picked)

    def both_ways(self) -> PairSet:
        """Every pair and its reverse."""
        return replace(self, pairs=[each for pair in self.pairs for each in (pair, pair.reversed())])


def evenly(items: list[T], count: int | None) -> list[T]:
    """At most `count` items, evenly spread over the list; None for all."""
    if count is None or count >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def some(items: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """At most `count` random rows in their order, the same ones for the same seed."""
    if len(items) <= count:
        return items
    return items[np.sort(np.random.default_rng(seed).choice(len(items), count, replace=False))]


def overlap(train: PairSet, test: PairSet) -> str | None:
    """Description of a scene (of one origin) or an image file that two sets share; None if they share nothing."""
    if train.origin and train.origin == test.origin:
        tested = {pair.scene for pair in test.pairs}
        scene = next((pair.scene for pair in train.pairs if pair.scene in tested), None)
        if scene is not None:
            return f"scene '{scene}'"
    files = _files(test)
    file = next((file for file in _files(train) if file in files), None)
    return None if file is None else f"picture '{file}'"


def _files(pairs: PairSet) -> dict[Path, None]:
    """Resolved image files in the order of the pairs."""
    named = dict.fromkeys(frame.file for pair in pairs.pairs for frame in (pair.a, pair.b))
    return {file.resolve(): None for file in named if file is not None}

"""What an evaluation reads: pairs of pictures with cameras and depth, told in the order they are wanted.

Nothing is read before it is asked for, so that a set of thousands of pairs opens at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from fastmum.data.errors import DataError

T = TypeVar("T")


class Camera(NamedTuple):
    """What is known of a frame's geometry, in unit coordinates: from (0, 0), upper left, to (1, 1), lower right.

    The centre of the pixel in row i, column j of H x W lies at ((j + 0.5) / W, (i + 0.5) / H), so that one camera fits
    the picture, its depth and its patches at any resolution.

    Args:
        K: (3, 3) float64 intrinsics.
        depth: (h, w) float32 z-depth of the whole picture, 0 where it is unknown.
    """

    K: np.ndarray
    depth: np.ndarray


@dataclass(frozen=True)
class Frame:
    """A picture and its camera.

    Args:
        key: names the frame within its set; frames of one key are read and encoded once.
        read_image: gives the picture, RGB.
        read_camera: gives its camera.
        file: the picture's, None where it is in none of its own.
    """

    key: str
    read_image: Callable[[], Image.Image]
    read_camera: Callable[[], Camera]
    file: Path | None = None


@dataclass(frozen=True)
class Pair:
    """Two views of one place.

    Args:
        name: of the pair, in results.
        scene: what may not be trained on where this pair is tested on.
        a, b: the frames.
        T_b_a: (4, 4) float64, takes points of camera a to camera b, in the unit of both depths. Camera axes: x right,
            y down, z forward.
    """

    name: str
    scene: str
    a: Frame
    b: Frame
    T_b_a: np.ndarray

    def reversed(self) -> Pair:
        """The same pair from b to a."""
        return replace(self, name=f"{self.name}, reversed", a=self.b, b=self.a, T_b_a=np.linalg.inv(self.T_b_a))


@dataclass(frozen=True)
class PairSet:
    """Pairs to evaluate on, or to train a probe on.

    Args:
        name: of the set: a column of the published tables, where there is one.
        pairs: at least one.
        size: side in pixels that its pictures are resized to where nobody asks for another.
        objects: whether each scene is one object in front of changing backgrounds, with depth on the object alone.
        origin: where the names of its scenes are unique: a data set or a folder; "" where they mean nothing elsewhere.
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
        """At most `count` pairs, evenly spread over the set, so that every scene of it has its share; None for all."""
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


def overlap(train: PairSet, test: PairSet) -> str | None:
    """What two sets share, in words: a scene of one origin, or the file of a picture; None for nothing."""
    if train.origin and train.origin == test.origin:
        tested = {pair.scene for pair in test.pairs}
        scene = next((pair.scene for pair in train.pairs if pair.scene in tested), None)
        if scene is not None:
            return f"scene '{scene}'"
    files = _files(test)
    file = next((file for file in _files(train) if file in files), None)
    return None if file is None else f"picture '{file}'"


def _files(pairs: PairSet) -> dict[Path, None]:
    """Resolved files of the pictures, in the order of the pairs."""
    named = dict.fromkeys(frame.file for pair in pairs.pairs for frame in (pair.a, pair.b))
    return {file.resolve(): None for file in named if file is not None}


def some(items: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """At most `count` rows at random, the same ones every time, in their order."""
    if len(items) <= count:
        return items
    return items[np.sort(np.random.default_rng(seed).choice(len(items), count, replace=False))]


def relative_pose(T_a: np.ndarray, T_b: np.ndarray) -> np.ndarray:
    """From camera a to camera b, given both world-to-camera matrices (4, 4)."""
    return T_b @ np.linalg.inv(T_a)


def unit_camera(K: np.ndarray, size: tuple[int, int], depth: np.ndarray) -> Camera:
    """A camera whose intrinsics are given in pixels.

    Args:
        K: (3, 3), pixels, the first of which has its centre at (0.5, 0.5).
        size: width and height of the picture in the same pixels.
        depth: see `Camera`.
    """
    return Camera(np.diag([1 / size[0], 1 / size[1], 1.0]) @ K, depth)

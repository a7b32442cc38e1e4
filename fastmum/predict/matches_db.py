"""Matches of image pairs in a COLMAP database, from which COLMAP builds models."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmum.errors import FastmumError, first_line


class PairMatches(NamedTuple):
    """Matches of two images, in pixels of their files without EXIF's turns, centres at +0.5 as in COLMAP."""

    first: str  # names of the images below their folder
    second: str
    points_first: np.ndarray  # (n, 2) float32
    points_second: np.ndarray  # (n, 2) float32
    certainty: np.ndarray  # (n,)


def require_pycolmap() -> Any:
    """pycolmap; FastmumError if it is not installed."""
    try:
        import pycolmap
    except ImportError:
        raise FastmumError("COLMAP databases need pycolmap: pip install 'fastmum[colmap]'") from None
    return pycolmap


def import_images(database: Path, root: Path, names: list[str]) -> dict[str, int]:
    """Write images and cameras, COLMAP's guess from EXIF or the size, and return the numbers of the images by name.

    Those that COLMAP cannot read are absent. FastmumError: the database cannot be written.

    Args:
        database: an empty file, or none.
        root: folder of the images.
    """
    pycolmap = require_pycolmap()
    with _writing():
        pycolmap.Database.open(database).close()
        pycolmap.import_images(database, root, pycolmap.CameraMode.AUTO, names)
        with pycolmap.Database.open(database) as opened:
            return {image.name: image.image_id for image in opened.read_all_images()}


def write_matches(database: Path, ids: dict[str, int], pairs: list[PairMatches], cell: float) -> tuple[int, int]:
    """Add keypoints, matches and verified geometry to a database; returns the numbers of keypoints and matches.

    Points of an image in the same cell are one keypoint at their mean, and a keypoint has at most one match in each
    other image, the most certain one. FastmumError: the database cannot be written.

    Args:
        ids: of `import_images`.
        pairs: each pair of images at most once.
        cell: side of the cells in pixels.
    """
    pycolmap = require_pycolmap()
    names = sorted({name for pair in pairs for name in (pair.first, pair.second)})
    keypoints, numbers = merge_points(pairs, names, cell)
    matches = [one_to_one(*both, pair.certainty) for both, pair in zip(numbers, pairs, strict=True)]
    with _writing():
        with pycolmap.Database.open(database) as opened:
            for name in names:
                opened.write_keypoints(ids[name], keypoints[name])
            for pair, found in zip(pairs, matches, strict=True):
                if len(found):
                    opened.write_matches(ids[pair.first], ids[pair.second], found)
        pycolmap.geometric_verification(database)
    return sum(map(len, keypoints.values())), sum(map(len, matches))


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise FastmumError(f"--colmap: the database cannot be written ({first_line(error)})") from None


def merge_points(
    pairs: list[PairMatches], names: list[str], cell: float
) -> tuple[dict[str, np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
    """Keypoints (n, 2) float32 of every image, and for every pair the numbers (m,) of those of its points."""
    sides = [(pair.first, pair.points_first) for pair in pairs] + [(pair.second, pair.points_second) for pair in pairs]
    numbers: list[np.ndarray] = [np.zeros(0, np.int64)] * len(sides)
    keypoints = {}
    for name in names:
        own = [i for i, (other, _) in enumerate(sides) if other == name]
        points = np.concatenate([sides[i][1] for i in own]).astype(np.float64)
        _, inverse, counts = np.unique(np.floor(points / cell), axis=0, return_inverse=True, return_counts=True)
        inverse = inverse.reshape(-1)
        means = [np.bincount(inverse, points[:, axis], len(counts)) / counts for axis in (0, 1)]
        keypoints[name] = np.stack(means, 1).astype(np.float32)
        for i, part in zip(own, np.split(inverse, np.cumsum([len(sides[i][1]) for i in own])[:-1]), strict=True):
            numbers[i] = part
    return keypoints, list(zip(numbers[: len(pairs)], numbers[len(pairs) :], strict=True))


def one_to_one(first: np.ndarray, second: np.ndarray, certainty: np.ndarray) -> np.ndarray:
    """Pairs of keypoints (m, 2) uint32 in which each comes once at most, the most certain ones."""
    order = np.argsort(-certainty, kind="stable")
    matches = np.stack([first[order], second[order]], 1)
    for side in (0, 1):
        matches = matches[np.sort(np.unique(matches[:, side], return_index=True)[1])]
    return matches.astype(np.uint32)

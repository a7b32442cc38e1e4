"""MegaDepth's scene information of DKM and RoMa: images, depth, cameras, and pairs with their overlap.

`prep_scene_info/<scene>.npy` is a dictionary: image_paths and depth_paths (None where absent), intrinsics (3, 3), poses
(world to camera), pairs (N, 2) of image numbers, and overlaps (N,).
"""

from pathlib import Path
from typing import Any

import numpy as np

from fastmum.data.arrays import read_archive
from fastmum.data.errors import DataError, reading
from fastmum.data.manifest import Manifest

SCENE_INFO = "megadepth_pairs"  # name of the builder
FOLDER = "prep_scene_info"
NEEDED = ("image_paths", "depth_paths", "intrinsics", "poses", "pairs", "overlaps")


def scene_file(root: Path, scene: str) -> Path:
    """The file of a scene."""
    return root / FOLDER / f"{scene}.npy"


def read_scene(file: Path) -> dict[str, Any]:
    """The content of a file; DataError if it cannot be read, or lacks a key."""
    content = read_archive(file)
    if missing := [name for name in NEEDED if name not in content]:
        raise DataError(f"'{file}' has no {', '.join(missing)}: it is no scene information of DKM or RoMa")
    return content


def images_of(content: dict[str, Any]) -> np.ndarray:
    """Numbers of the images that have a depth map, ascending: the frames of the manifest."""
    columns = zip(content["image_paths"], content["depth_paths"], strict=True)
    return np.array([i for i, each in enumerate(columns) if None not in each], np.int64)


def listed_pairs(part: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows (N, 2) int64 of a manifest, and their overlap (N,) float32; those without depth are left out."""
    rows, overlaps = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)]
    for sequence in range(part.num_sequences):
        file = scene_file(Path(part.root), part.sequence_name(sequence))
        content, (first, end) = read_scene(file), part.starts[sequence : sequence + 2]
        with reading(file, "scene information"):
            images, pairs = images_of(content), np.asarray(content["pairs"], np.int64).reshape(-1, 2)
            if len(images) != end - first:
                raise DataError(f"'{file}' has changed since the manifest '{part.path}' was built: build it again")
            row_of = np.full(len(content["image_paths"]), -1, np.int64)
            row_of[images] = first + np.arange(len(images))
            found = row_of[pairs]
            known = (found >= 0).all(1)
            rows.append(found[known])
            overlaps.append(np.asarray(content["overlaps"], np.float32)[known])
    return np.concatenate(rows), np.concatenate(overlaps)

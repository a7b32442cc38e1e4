"""A synthetic COLMAP model of a photo collection: cameras around a landmark, with realistic tracks."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Scene(NamedTuple):
    """Observations sorted by point: image and point of each (m,), and the heading of each camera (n,) in radians."""

    images: np.ndarray
    points: np.ndarray
    headings: np.ndarray


def draw_scene(num_images: int, num_points: int, seed: int = 0) -> Scene:
    """Cameras on a circle, crowded at popular places; cameras within some tens of degrees see the same point.

    As in real reconstructions, track lengths are 2 + a log-normal tail (median 5, mean 10, maximum several hundred),
    and the numbers of points per image vary by two orders of magnitude.
    """
    rng = np.random.default_rng(seed)
    crowd = rng.random(num_images) < 0.5
    headings = np.sort(np.where(crowd, rng.normal(0, 0.4, num_images), rng.uniform(-np.pi, np.pi, num_images)))
    # Each image has an arc of a circle, long if it sees many points; the observations of a point fall on the circle.
    ends = np.cumsum(rng.lognormal(0, 1, num_images))
    lengths = np.minimum(2 + rng.lognormal(np.log(4.2), 1.35, num_points).astype(np.int64), num_images // 2)
    points = np.repeat(np.arange(num_points), lengths)
    spread = np.repeat(rng.lognormal(np.log(0.02), 0.5, num_points), lengths)
    place = np.repeat(rng.random(num_points), lengths) + rng.normal(0, 1, len(points)) * spread
    images = np.searchsorted(ends, place % 1 * ends[-1])
    key = np.unique(points * num_images + images)  # a point once per image
    return Scene((key % num_images).astype(np.int32), key // num_images, headings)


def write_binary_model(scene: Scene, folder: Path) -> None:
    """Write COLMAP's cameras.bin, images.bin and points3D.bin."""
    folder.mkdir(parents=True)
    (folder / "cameras.bin").write_bytes(struct.pack("<QiiQQdddd", 1, 1, 1, 640, 480, 500.0, 500.0, 320.0, 240.0))
    order = np.argsort(scene.images, kind="stable")
    starts = np.searchsorted(scene.images[order], np.arange(len(scene.headings) + 1))
    index = np.empty(len(order), np.uint32)
    with (folder / "images.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(scene.headings)))
        for i, heading in enumerate(scene.headings):
            seen = order[starts[i] : starts[i + 1]]
            index[seen] = np.arange(len(seen))
            quaternion = (np.cos(heading / 2), 0.0, np.sin(heading / 2), 0.0)
            file.write(struct.pack("<i7di", i + 1, *quaternion, 0.0, 0.0, 1.0, 1))
            file.write(f"{i:06d}.jpg\0".encode() + struct.pack("<Q", len(seen)))
            features = np.zeros(len(seen), np.dtype([("xy", "<f8", 2), ("point", "<u8")]))
            features["point"] = scene.points[seen] + 1
            file.write(features.tobytes())
    tracks = np.stack([scene.images + 1, index], 1).astype("<i4")
    numbers, starts = np.unique(scene.points, return_index=True)
    ends = np.append(starts[1:], len(scene.points))
    with (folder / "points3D.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(numbers)))
        for number, start, end in zip(numbers.tolist(), starts.tolist(), ends.tolist(), strict=True):
            file.write(struct.pack("<Q3d3BdQ", number + 1, 0, 0, 0, 0, 0, 0, 0, end - start))
            file.write(tracks[start:end].tobytes())

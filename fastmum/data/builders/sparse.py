"""Depth maps of COLMAP's 3-D points, written next to the manifest: a few pixels of each image are known."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastmum.data.builders.base import Options
from fastmum.data.colmap import Model
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord
from fastmum.data.samples import image_size
from fastmum.errors import writing
from fastmum.files import atomic_path

LONGEST = 256  # px of a map: a point covers a block of pixels of the image, so that shrinking it keeps the points


def depth_folder(options: Options) -> Path:
    """Folder of the maps: `all_depth` next to `all.arrow`."""
    return options.out.with_name(f"{options.out.stem}_depth")


def common_root(root: Path, options: Options) -> Path:
    """The folder that contains both the images and the maps, if there are maps."""
    return Path(os.path.commonpath([root, options.out.parent])) if options.sparse_depth else root


def sparse_depth(root: Path, part: str, images: str, model: Model, options: Options) -> Callable[[str], str]:
    """A function that writes the map of an image and returns its path below `common_root`, "" if it sees no point."""
    numbers = {name: i for i, name in enumerate(model.names)}
    order = np.argsort(model.images, kind="stable")
    ends = np.searchsorted(model.images[order], np.arange(len(model.names) + 1))
    common = common_root(root, options)

    def write(name: str) -> str:
        i = numbers[name]
        seen = order[ends[i] : ends[i + 1]]
        assert model.positions is not None
        assert model.xyz is not None
        R, t = model.poses[i, :3, :3], model.poses[i, :3, 3]
        z = model.xyz[model.points[seen]] @ R[2] + t[2]
        depth = splat(model.positions[seen], z, image_size(root / images / name))
        if not depth.any():
            return ""
        file = depth_folder(options) / part / f"{name}.npz"
        with writing(file, DataError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(file) as partial, open(partial, "wb") as stream:
                np.savez_compressed(stream, depth=depth)
        return file.relative_to(common).as_posix()

    return write


def splat(positions: np.ndarray, z: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of at most `LONGEST` pixels a side, (h, w) float32: the nearest point in each pixel, 0 where there is none.

    `positions` (n, 2) are pixels of an image of `size` (width, height), `z` (n,) depths.
    """
    scale = min(1.0, LONGEST / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    x, y = (np.floor(positions * (width / size[0], height / size[1])).astype(np.int64)).T
    keep = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (z > 0)
    depth = np.full((height, width), np.inf, np.float32)
    np.minimum.at(depth, (y[keep], x[keep]), z[keep].astype(np.float32))
    return np.where(np.isfinite(depth), depth, np.float32(0))


def below_common_root(records: Iterator[SequenceRecord], root: Path, options: Options) -> Iterator[SequenceRecord]:
    """The records with the paths of their images below `common_root`."""
    prefix = root.relative_to(common_root(root, options)).as_posix()
    for record in records:
        yield record._replace(frames=[f"{prefix}/{frame}" for frame in record.frames]) if prefix != "." else record

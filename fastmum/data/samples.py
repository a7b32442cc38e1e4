"""Frames with image, depth, mask and camera, read together."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastmum.data.decode.image import read_size, read_upright
from fastmum.data.depth import DepthFormat, read_depth, read_mask
from fastmum.data.errors import DataError, reading
from fastmum.data.manifest import Manifest
from fastmum.geometry import Camera, View
from fastmum.geometry.camera import intrinsics_matrix, ray_to_z
from fastmum.geometry.crop import resize_nearest

UNKNOWN_POSE = np.full((4, 4), np.nan)


@dataclass(frozen=True, eq=False)
class Frame:
    """The files and the camera of a frame; methods read the files, and raise DataError if one cannot be read."""

    key: str  # identifies the frame in its data set
    file: Path | None = None  # the image
    K: np.ndarray | None = None  # (3, 3) intrinsics in pixels of the upright image; None where unknown
    camera_from_world: np.ndarray | None = None  # (4, 4), OpenCV axes; None where unknown
    depth: Path | None = None  # the map of the whole image, of any resolution; None if there is none
    depth_format: DepthFormat | None = None
    mask: Path | None = None  # of any resolution; None if there is none

    def read_image(self) -> Image.Image:
        """The upright image, RGB."""
        assert self.file is not None
        return read_rgb(self.file)

    def read_camera(self) -> Camera | None:
        """The camera of the image; None where the intrinsics are unknown."""
        if self.K is None:
            return None
        assert self.file is not None
        pose = UNKNOWN_POSE if self.camera_from_world is None else self.camera_from_world
        return Camera(self.K.astype(np.float64), pose.astype(np.float64), image_size(self.file))

    def read_depth(self) -> np.ndarray | None:
        """z-depth (h, w) float32 at the resolution that it is stored at, 0 where unknown; None if there is none.

        Raises DataError also for ray distances without the intrinsics that convert them.
        """
        if self.depth is None or self.depth_format is None:
            return None
        depth = read_depth(self.depth, self.depth_format)
        if self.depth_format.kind == "z":
            return depth
        if (camera := self.read_camera()) is None:
            raise DataError(f"'{self.depth}' holds ray distances, but the intrinsics of '{self.file}' are unknown")
        return ray_to_z(depth, camera.resized(depth.shape[::-1]).K)

    def view(self, augment: Callable[[View], View] | None = None) -> View:
        """Image, depth, mask and camera of one size, that of the image; absent ones are None.

        `augment` crops, resizes, flips; see `fastmum.geometry.crop`.
        """
        image, camera = np.asarray(self.read_image()), self.read_camera()
        maps = self.read_depth(), None if self.mask is None else read_mask(self.mask)
        depth, mask = (None if each is None else resize_nearest(each, image.shape[1::-1]) for each in maps)
        view = View(image, camera and camera.resized(image.shape[1::-1]), depth, mask)
        return view if augment is None else augment(view)


def manifest_frame(manifest: Manifest, row: int) -> Frame:
    """A frame of a manifest."""
    intrinsics, pose = manifest.camera_arrays(row)
    file = manifest.file(row)
    depth, depth_format = manifest.depth_file(row) or (None, None)
    K = None if intrinsics is None else intrinsics_matrix(*intrinsics)
    return Frame(str(file), file, K, pose, depth, depth_format, manifest.mask_file(row))


def read_rgb(file: Path) -> Image.Image:
    """The upright image, RGB; raises DataError if it cannot be read."""
    with reading(file, "an image"):
        return Image.fromarray(read_upright(file))


def image_size(file: Path) -> tuple[int, int]:
    """Width and height of the upright image, from its header; raises DataError if it cannot be read."""
    with reading(file, "an image"):
        return read_size(file)[1:]

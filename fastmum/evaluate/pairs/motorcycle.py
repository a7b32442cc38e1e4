"""The Middlebury 2014 stereo pair "Motorcycle" that comes with scikit-image: a real photograph with measured disparity.

Calibration of the images at a quarter of their size: documentation of `skimage.data.stereo_motorcycle`.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from fastmum.data.errors import DataError
from fastmum.data.samples import Frame
from fastmum.evaluate.pairs import scenes
from fastmum.evaluate.pairs.pair import Pair, PairSet
from fastmum.geometry import Camera
from fastmum.geometry.camera import intrinsics_matrix

FOCAL = 994.978  # pixels
CENTRE_X, CENTRE_Y = 311.193, 254.877  # pixels, left camera, centre of the first pixel at 0
OFFSET = 31.086  # pixels that the principal point of the right camera is further right
BASELINE = 0.193001  # metres


def stereo(part: str) -> PairSet:
    """The pair for "test" and "all"; nothing is left to train on, so "train" is that of the rendered scenes."""
    if part == "train":
        return scenes.embedded("train")
    _read()  # fail early
    frames = []
    for side, name in enumerate(("left", "right")):
        pose = np.eye(4)
        pose[0, 3] = -side * BASELINE
        K = intrinsics_matrix(FOCAL, FOCAL, CENTRE_X + side * OFFSET + 0.5, CENTRE_Y + 0.5)
        frames.append(_Side(name, K=K, camera_from_world=pose, side=side))
    return PairSet("motorcycle", [Pair("motorcycle", "motorcycle", *frames)])


@dataclass(frozen=True, eq=False)
class _Side(Frame):
    """The left (0) or the right (1) image."""

    side: int = 0

    def read_image(self) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(_read()[self.side][..., :3]))

    def read_camera(self) -> Camera:
        assert self.K is not None
        assert self.camera_from_world is not None
        return Camera(self.K, self.camera_from_world, _read()[2].shape[::-1])

    def read_depth(self) -> np.ndarray:
        disparity = _read()[2]
        depth = FOCAL * BASELINE / ((_seen_from_right(disparity) if self.side else disparity) + OFFSET)
        return np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)


@cache
def _read() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        from skimage.data import stereo_motorcycle

        return stereo_motorcycle()
    except Exception as error:  # missing package, missing file, or no network to fetch it from
        raise DataError(f"scikit-image's motorcycle pair cannot be read ({error}): pip install scikit-image") from None


def _seen_from_right(disparity: np.ndarray) -> np.ndarray:
    """Disparity of the right image's pixels, NaN where no left pixel lands; of several, the nearest to the camera."""
    rows, columns = np.nonzero(np.isfinite(disparity))
    values = disparity[rows, columns]
    landed = np.rint(columns - values).astype(int)
    inside = landed >= 0
    right = np.full(disparity.shape, -np.inf, np.float32)
    np.maximum.at(right, (rows[inside], landed[inside]), values[inside])
    return np.where(np.isfinite(right), right, np.nan)

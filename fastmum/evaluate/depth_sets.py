"""Images with depth as DINOv2's depth probes train and test on them: NYU, KITTI, SUN RGB-D, and embedded sets.

Sources: the layouts, crops and augmentation of zhyever/Monocular-Depth-Estimation-Toolbox, and DINOv2's released
configurations.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError, reading
from fastmum.data.samples import Frame
from fastmum.evaluate.pairs import motorcycle, scenes
from fastmum.files import expand_user
from fastmum.geometry import View, crop_resize
from fastmum.geometry.crop import Box, flip
from fastmum.geometry.metrics import DepthCrop
from fastmum.tasks.depth import scaled

ANGLE = 2.5  # degrees
GAMMA, COLOUR = (0.9, 1.1), (0.9, 1.1)  # ranges, of values of 0 to 255
CHANCE = 0.5  # of a rotation, of a flip, of other colours


@dataclass(frozen=True)
class DepthProtocol:
    """How a set is trained on and tested."""

    max_depth: float  # metres: the last bin, and what is scored
    crop: DepthCrop | None = None  # the part of a map that is scored
    train_box: Callable[[int, int], Box] | None = None  # of an image of this width and height
    test_box: Callable[[int, int], Box] | None = None
    train_size: tuple[int, int] | None = None  # width and height of random crops; None: whole images
    test_size: tuple[int, int] | None = None  # width and height that test images are resized to
    brightness: tuple[float, float] = (0.75, 1.25)
    cap: float | None = None  # metres: both true and predicted depth are cut off
    longest: int | None = None  # longer side that images are resized to at first, pixels; None: they are not


def kitti_box(width: int, height: int) -> Box:
    """The bottom 352 rows and the middle 1216 columns."""
    left = (width - 1216) // 2
    return left, height - 352, left + 1216, height


INDOOR = DepthProtocol(max_depth=15.0)
NYU = DepthProtocol(10.0, "eigen", train_box=lambda width, height: (43, 45, 608, 472), train_size=(544, 416))
KITTI = DepthProtocol(80.0, "garg", kitti_box, kitti_box, train_size=(704, 352), brightness=(0.9, 1.1))
SUNRGBD = DepthProtocol(10.0, "eigen", test_size=(480, 640), cap=8.0)  # this size is DINOv2's, portrait though it is


@dataclass(frozen=True)
class DepthSet:
    """Images with depth."""

    name: str
    frames: list[Frame]
    protocol: DepthProtocol
    skipped: dict[str, str] = field(default_factory=dict)  # frames that cannot be used, and why; grows during reading

    def resized(self, longest: int | None) -> Self:
        """The set with images of another size; DataError if its protocol fixes the size."""
        if longest is None:
            return self
        if self.protocol.train_size or self.protocol.test_size:
            raise DataError(f"--size is {longest}, but the protocol of '{self.name}' fixes the size of its images")
        return replace(self, protocol=replace(self.protocol, longest=longest))


@dataclass(frozen=True)
class Listed:
    """A set whose images and depth maps are listed in text files, a line for each: image, depth or None, focal."""

    lists: dict[str, str]  # pattern of the list by part
    images: str  # folder that paths of images are relative to
    depths: str
    format: DepthFormat
    protocol: DepthProtocol


LISTED = {
    "nyu": Listed({"train": "nyu_train.txt", "test": "nyu_test.txt"}, "", "", DepthFormat("png16", 1e-3), NYU),
    "kitti": Listed({"train": "kitti_eigen_train*.txt", "test": "kitti_eigen_test*.txt"}, "input", "gt_depth",
                    DepthFormat("png16", 1 / 256), KITTI),
    "sunrgbd": Listed({"test": "*val_splits.txt"}, "", "", DepthFormat("sunrgbd", 1e-3), SUNRGBD),
}  # fmt: skip
KINDS = "scenes, motorcycle, scenes:/path, nyu:/path, kitti:/path or sunrgbd:/path"


def open_depth(name: str, part: str) -> DepthSet:
    """The part "train" or "test" of the set that a user names; DataError if it cannot be read, or has no such part."""
    kind, _, path = name.partition(":")
    if name == "motorcycle" and part == "test":
        return DepthSet(name, [motorcycle.stereo("test").pairs[0].a], INDOOR)
    if kind == "scenes" or name == "motorcycle":
        folders = scenes.folders_of(expand_user(path), part) if path else scenes.embedded_folders(part)
        title = f"{expand_user(path).resolve().name} (folder)" if path else "scenes"
        return DepthSet(title, [frame for folder in folders for frame in scenes.frames_of(folder)], INDOOR)
    if kind not in LISTED or not path:
        raise DataError(f"'{name}' is no set of images with depth: {KINDS} is expected")
    return _listed(kind, expand_user(path), part)


def _listed(kind: str, root: Path, part: str) -> DepthSet:
    layout = LISTED[kind]
    if part not in layout.lists:
        raise DataError(f"'{kind}' has nothing to train on; --train-data names another set, such as nyu:/path")
    files = sorted(root.glob(layout.lists[part]))
    if not files:
        raise DataError(f"'{root}' holds no list {layout.lists[part]}")
    with reading(files[0], "a list of images and depth maps"):
        lines = [line.split() for line in files[0].read_text().splitlines() if line.strip()]
        pairs = sorted((line[0].lstrip("/"), line[1].lstrip("/")) for line in lines)
    found = DepthSet(kind, [], layout.protocol)
    for image, depth in pairs:
        if depth == "None":
            found.skipped[image] = "the list names no depth"
        else:
            file = root / layout.depths / depth
            found.frames.append(Frame(image, root / layout.images / image, None, None, file, layout.format))
    if not found.frames:
        raise DataError(f"'{files[0]}' names no image with depth")
    return found


def read_view(frame: Frame) -> View:
    """Image and depth of a frame; DataError if one of them is missing, they differ in size, or no depth is known."""
    image, depth = np.asarray(frame.read_image()), frame.read_depth()
    if depth is None:
        raise DataError(f"'{frame.key}' has no depth map")
    if depth.shape != image.shape[:2]:
        sizes = f"{depth.shape[1]} x {depth.shape[0]} pixels, its image {image.shape[1]} x {image.shape[0]}"
        raise DataError(f"the depth map of '{frame.key}' has {sizes}")
    if not depth.any():
        raise DataError(f"no depth of '{frame.key}' is known")
    return View(image, None, depth)


def train_view(view: View, protocol: DepthProtocol, rng: np.random.Generator) -> View:
    """The view cropped, rotated, flipped, cropped at random, and recoloured as in training.

    DataError: the image is smaller than the crop.
    """
    if protocol.train_box is not None:
        view = cut(view, protocol.train_box(*view.size))
    if protocol.longest is not None:
        view = crop_resize(view, None, scaled(view.size, protocol.longest))
    if rng.random() < CHANCE:
        view = rotate(view, rng.uniform(-ANGLE, ANGLE))
    if rng.random() < CHANCE:
        view = flip(view)
    if protocol.train_size is not None:
        width, height = protocol.train_size
        left, top = (int(rng.integers(max(0, n) + 1)) for n in (view.size[0] - width, view.size[1] - height))
        view = cut(view, (left, top, left + width, top + height))
    if rng.random() < CHANCE:
        factors = rng.uniform(*protocol.brightness) * rng.uniform(*COLOUR, size=3)
        image = (view.image.astype(np.float32) ** rng.uniform(*GAMMA) * factors).clip(0, 255)
        view = View(np.rint(image).astype(np.uint8), None, view.depth)
    return view


def cut(view: View, box: Box) -> View:
    """A part of the view; DataError if it is not inside."""
    if min(box) < 0 or box[2] > view.size[0] or box[3] > view.size[1]:
        raise DataError(f"an image of {view.size[0]} x {view.size[1]} pixels does not hold the crop {box}")
    return crop_resize(view, box)


def rotate(view: View, degrees: float) -> View:
    """The view rotated about its centre, the image bilinear and the depth nearest, with 0 outside."""
    assert view.depth is not None
    image = Image.fromarray(view.image).rotate(degrees, Image.Resampling.BILINEAR)
    return View(np.asarray(image), None, np.asarray(Image.fromarray(view.depth).rotate(degrees)))


def scored_view(view: View, protocol: DepthProtocol) -> tuple[np.ndarray, np.ndarray]:
    """The image (h, w, 3) uint8 that is predicted, and true depth (H, W) that the prediction is compared with."""
    if protocol.test_box is not None:
        view = cut(view, protocol.test_box(*view.size))
    assert view.depth is not None
    depth = view.depth if protocol.cap is None else view.depth.clip(max=protocol.cap)
    size = protocol.test_size or (view.size if protocol.longest is None else scaled(view.size, protocol.longest))
    if size == view.size:
        return view.image, depth
    return np.asarray(Image.fromarray(view.image).resize(size, Image.Resampling.BILINEAR)), depth

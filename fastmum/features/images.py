"""Images of any size on the way to an encoder: which there are, what size each gets, and how it is read."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import natsort
import numpy as np

from fastmum.data.builders.folder import image_folders
from fastmum.data.builders.listing import images_in
from fastmum.data.decode.image import FrameError, place, read_file, read_header, resize, rgb
from fastmum.data.errors import DataError
from fastmum.features.errors import FeaturesError
from fastmum.model.inputs import IMAGENET_MEAN

PADDING = np.array([round(255 * mean) for mean in IMAGENET_MEAN], np.uint8)  # 0 when normalised


class Placement(NamedTuple):
    """Where an image lies in what the encoder sees, in pixels: `height` x `width` of it, at its top left.

    Args:
        content_height, content_width: that the image is resized to; what is left is padding.
    """

    height: int
    width: int
    content_height: int
    content_width: int


@dataclass(frozen=True)
class Sizing:
    """How images get sides that the patch size divides.

    Args:
        multiple: the patch size.
        size: height and width that all images get; None: each keeps its own as nearly as possible.
        fit: "resize": to the size, or to the nearest multiples of its own; "pad": the aspect is kept and the rest, at
            the right and at the bottom, is ImageNet's mean colour.
        max_side: images that keep their own size are scaled down to this longest side; 0: none.

    Raises:
        FeaturesError: a size that is no multiple of the patch size.
    """

    multiple: int
    size: tuple[int, int] | None = None
    fit: Literal["resize", "pad"] = "resize"
    max_side: int = 1024

    def __post_init__(self) -> None:
        if self.size and any(side < 1 or side % self.multiple for side in self.size):
            height, width = self.size
            raise FeaturesError(f"the size is {height} x {width}, but must be of multiples of {self.multiple}")
        if self.max_side and self.max_side < self.multiple:
            raise FeaturesError(f"the longest side is at most {self.max_side}, less than a patch of {self.multiple}")

    def place(self, height: int, width: int) -> Placement:
        """What becomes of an image of this height and width."""
        if self.size:
            scale = min(self.size[0] / height, self.size[1] / width)
            return self._placed(self.size, (height * scale, width * scale))
        scale = min(1.0, self.max_side / max(height, width)) if self.max_side else 1.0
        content = height * scale, width * scale
        to_whole = round if self.fit == "resize" else math.ceil
        # Pixels first, so that nothing but whole ones is padded.
        whole = [round(side) if self.fit == "pad" else side for side in content]
        return self._placed([max(1, to_whole(side / self.multiple)) * self.multiple for side in whole], content)

    def _placed(self, sides: Sequence[int], content: Sequence[float]) -> Placement:
        if self.fit == "resize":
            return Placement(*sides, *sides)
        return Placement(*sides, *(min(side, max(1, round(inner))) for side, inner in zip(sides, content, strict=True)))


@dataclass
class Images:
    """Image files, their names, and those that were skipped.

    Args:
        root: folder that names are relative to.
        files: what there is.
        skipped: names of those that cannot be read, and why; filled as that is found out.
    """

    root: Path
    files: list[Path]
    skipped: dict[str, str] = field(default_factory=dict)

    def name(self, file: Path) -> str:
        """Path of a file from the root, with forward slashes."""
        return file.relative_to(self.root).as_posix()

    def sizes(self) -> dict[Path, tuple[int, int]]:
        """Height and width of every upright image, by headers alone; those that have none are skipped."""
        sizes = {}
        for file in self.files:
            try:
                header = read_header(read_file(file))
                sizes[file] = (header.height, header.width)
            except FrameError as error:
                self.skipped[self.name(file)] = str(error)
        return sizes


def find_images(words: Iterable[str | os.PathLike[str]]) -> Images:
    """Image files by folders, by their own names, or by patterns such as "scenes/**/*.jpg".

    Of a folder, all images in it are taken, but not those in hidden folders and those of depth, masks and normals.

    Raises:
        FeaturesError: a word that stands for no image.
    """
    words = [os.path.expanduser(word) for word in words]
    files = list(dict.fromkeys(Path(os.path.abspath(file)) for word in words for file in _found(word)))
    if len(words) == 1 and os.path.isdir(words[0]):
        return Images(Path(os.path.abspath(words[0])), files)
    return Images(Path(os.path.commonpath([file.parent for file in files])), files)


def _found(word: str) -> list[str]:
    if os.path.isdir(word):
        try:
            folders = [Path(word, folder) for folder in image_folders(Path(word))]
            found = [os.path.join(folder, name) for folder in folders for name in images_in(folder)]
        except DataError as error:
            raise FeaturesError(str(error)) from None
    elif os.path.exists(word):
        return [word]
    elif glob.has_magic(word):
        matches = natsort.natsorted(glob.glob(word, recursive=True))
        found = [file for match in matches for file in (_found(match) if os.path.isdir(match) else [match])]
    else:
        raise FeaturesError(f"'{word}' does not exist")
    if not found:
        raise FeaturesError(f"there are no images in '{word}'" if os.path.isdir(word) else f"nothing matches '{word}'")
    return found


def read_image(file: Path, placement: Placement) -> np.ndarray:
    """An image upright, resized and padded, (height, width, 3) uint8 RGB.

    Raises:
        FrameError: it cannot be decoded.
    """
    header = read_header(read_file(file))
    stored = np.asarray(rgb(header.image))
    image = np.empty((header.height, header.width, 3), np.uint8)
    place(stored, image, header.orientation, flip=False)
    content = placement.content_height, placement.content_width
    if image.shape[:2] != content:
        image = resize(image, content)
    if content == (placement.height, placement.width):
        return image
    padded = np.tile(PADDING, (placement.height, placement.width, 1))
    padded[: content[0], : content[1]] = image
    return padded

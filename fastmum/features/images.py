"""Input images: finding files, the size each image gets, and reading it at that size."""

import glob
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import natsort
import numpy as np

from fastmum.data.builders.base import image_folders, images_in
from fastmum.data.decode.image import FrameError, read_header, read_upright, resize
from fastmum.data.errors import DataError
from fastmum.errors import FastmumError
from fastmum.model.inputs import IMAGENET_MEAN
from fastmum.progress import progress_bar


class FeaturesError(FastmumError):
    """Features that cannot be computed, written or read."""


class Placement(NamedTuple):
    """Pixels of the encoder's input, and of the resized image at its top left; the rest is padding."""

    height: int
    width: int
    content_height: int
    content_width: int


@dataclass(frozen=True)
class Sizing:
    """How images get sides that are multiples of the patch size; FeaturesError if they cannot."""

    multiple: int  # the patch size
    size: tuple[int, int] | None = None  # height and width of all images; None: as near as possible to their own
    fit: Literal["resize", "pad"] = "resize"  # pad: keep the aspect ratio, pad right and bottom with the mean colour
    max_side: int = 1024  # images that keep their size are scaled down to this longest side; 0: never

    def __post_init__(self) -> None:
        if self.size and any(side < 1 or side % self.multiple for side in self.size):
            height, width = self.size
            raise FeaturesError(f"the size is {height} x {width}, but must be multiples of {self.multiple}")
        if self.max_side and self.max_side < self.multiple:
            raise FeaturesError(f"the longest side is at most {self.max_side}, less than a patch of {self.multiple}")

    def place(self, height: int, width: int) -> Placement:
        """The placement of an image of this height and width in pixels."""
        m, resize = self.multiple, self.fit == "resize"
        if self.size:
            scale = min(self.size[0] / height, self.size[1] / width)
        else:
            scale = min(1.0, self.max_side / max(height, width)) if self.max_side else 1.0
        content = height * scale, width * scale
        # For padding, sides are rounded to pixels first, so that only whole pixels are padded.
        patches = (max(1, round(side / m) if resize else math.ceil(round(side) / m)) for side in content)
        rows, columns = self.size or (count * m for count in patches)
        inner_rows, inner_columns = (rows, columns) if resize else (max(1, round(side)) for side in content)
        return Placement(rows, columns, min(rows, inner_rows), min(columns, inner_columns))


@dataclass
class Images:
    """Image files below a folder."""

    root: Path  # folder that names are relative to
    files: list[Path]
    skipped: dict[str, str] = field(default_factory=dict)  # names of unreadable files, and why; filled during reading

    def name(self, file: Path) -> str:
        """Path of a file from the root, with forward slashes; bytes that are not UTF-8 are escaped, such as `\\xe9`."""
        return os.fsencode(file.relative_to(self.root).as_posix()).decode(errors="backslashreplace")

    def read(self, file: Path) -> np.ndarray | None:
        """The upright image (height, width, 3) uint8 RGB; None if it cannot be decoded, as `skipped` says then."""
        try:
            return read_upright(file)
        except FrameError as error:
            self.skipped[self.name(file)] = str(error)
            return None

    def sizes(self, progress: bool = True) -> dict[Path, tuple[int, int]]:
        """Upright height and width of each image from its header; unreadable files are skipped."""

        def read(file: Path) -> tuple[int, int] | str:
            try:
                header = read_header(file)
                return header.height, header.width
            except FrameError as error:
                return str(error)

        with ThreadPoolExecutor() as pool:
            done = pool.map(read, self.files)
            bar = progress_bar(done, show=progress, total=len(self.files), unit="image", desc="sizes")
            found = dict(zip(self.files, bar, strict=True))
        self.skipped |= {self.name(file): why for file, why in found.items() if isinstance(why, str)}
        return {file: size for file, size in found.items() if not isinstance(size, str)}


def find_images(words: Iterable[str | os.PathLike[str]]) -> Images:
    """Find images by folders, file names, or patterns such as "scenes/**/*.jpg".

    A folder stands for all images below it, but for those in hidden folders and those of depth, masks, labels, normals.
    FeaturesError if a word matches no image.
    """
    names = [os.path.expanduser(os.fspath(word)) for word in words]
    files = list(dict.fromkeys(Path(os.path.abspath(file)) for name in names for file in _found(name)))
    folder = len(names) == 1 and os.path.isdir(names[0])
    return Images(Path(os.path.abspath(names[0]) if folder else os.path.commonpath([f.parent for f in files])), files)


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


def read_image(file: Path, placement: Placement, mean: Sequence[float] = IMAGENET_MEAN) -> np.ndarray:
    """An upright image, resized and padded: (height, width, 3) uint8 RGB; FrameError if it cannot be decoded.

    The padding is `mean`, the encoder's mean colour in 0..1, and so nearly 0 after normalisation.
    """
    image = read_upright(file)
    height, width = placement.content_height, placement.content_width
    if image.shape[:2] != (height, width):
        image = resize(image, (height, width))
    colour = np.array([round(255 * value) for value in mean], np.uint8)
    padded = np.tile(colour, (placement.height, placement.width, 1))
    padded[:height, :width] = image
    return padded

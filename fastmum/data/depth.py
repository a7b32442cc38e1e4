"""Depth maps and masks as data sets store them."""

import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastmum.data.errors import DataError, reading
from fastmum.data.store import WHOLE, StoredPath, source
from fastmum.files import regular

MOST_PIXELS = 1 << 28  # of a depth map


class DepthFormat(NamedTuple):
    """How depth maps are stored."""

    reader: str  # key of `READERS`
    unit: float = 1.0  # metres per stored unit; 1.0 where the scale is that of a reconstruction, hence arbitrary
    kind: str = "z"  # distance along the optical axis, or "ray": distance to the camera centre
    unknown: float | None = None  # stored value of pixels without depth, besides 0, negative and non-finite ones
    max: float | None = None  # larger depths, in metres, are unknown (sky)


def read_depth(file: Path, format: DepthFormat) -> np.ndarray:
    """Read a depth map in metres, (H, W) float32, 0 where unknown. `format.kind` is not converted.

    DataError: the file cannot be read, or h5py is not installed.
    """
    with reading(file, f"a depth map ({format.reader})"):
        stored = READERS[format.reader](file)
        if stored.ndim != 2:
            raise ValueError(f"its shape is {stored.shape}, not (height, width)")
        stored = stored.astype(np.float32)
    depth = stored * np.float32(format.unit)
    valid = np.isfinite(depth) & (depth > 0)
    if format.unknown is not None:
        valid &= stored != format.unknown
    if format.max is not None:
        valid &= depth <= format.max
    return np.where(valid, depth, np.float32(0))


def read_mask(file: Path) -> np.ndarray:
    """Read a mask, (H, W) bool: true where the stored 8-bit value is over 127."""
    with reading(file, "a mask"), open_image(file) as image:
        return np.asarray(image.convert("L")) > 127


def open_image(file: Path | io.BytesIO) -> Image.Image:
    """See `fastmum.data.decode.image`, which imports torch: manifests, which use formats of depth, do not need it."""
    from fastmum.data.decode import image

    return image.open_image(file)


def side(file: Path, reader: str) -> Path:
    """The file that a map needs besides itself: its own in an archive, else the one in its place among folders."""
    return getattr(file, "side", None) or SIDES[reader](file)


@contextlib.contextmanager
def _real(file: Path) -> Iterator[Path]:
    """A file that a library can open by its name."""
    if isinstance(stored := source(file), Path):
        yield stored
        return
    with tempfile.NamedTemporaryFile(suffix=file.suffix) as copy:
        copy.write(stored.read())
        copy.flush()
        yield Path(copy.name)


def _eth3d(file: Path) -> np.ndarray:
    """float32 without a header, in the size of the image `images/<folder>/<name>` next to `ground_truth_depth`."""
    from fastmum.data.decode.image import read_size  # as `open_image`

    width, height = read_size(side(file, "eth3d"))[1:]
    return np.frombuffer(regular(file).read_bytes(), "<f4").reshape(height, width)


def read_npy(file: Path) -> np.ndarray:
    """Read an array, mapped: a shape that the file is too short for is a ValueError before memory is allocated."""
    stored = source(file)
    return np.load(stored, mmap_mode="r" if isinstance(stored, Path) else None, allow_pickle=False)


def _pixels(file: Path | io.BytesIO) -> np.ndarray:
    with open_image(file) as image:
        return np.asarray(image)


def _png16(file: Path) -> np.ndarray:
    stored = _pixels(file)
    if stored.dtype.itemsize == 1:
        raise ValueError(f"its pixels, {stored.shape}, have 8 bits instead of 16")
    return stored


def _sunrgbd(file: Path) -> np.ndarray:
    """SUN RGB-D's 16-bit PNG, whose bits are rotated to the left by 3."""
    stored = _png16(file).astype(np.uint16)
    return (stored >> 3) | (stored << 13)


def _co3d(file: Path) -> np.ndarray:
    """float16 bits in a 16-bit PNG; 0 outside `../depth_masks/<frame>.png`, where MVS depth is unreliable."""
    depth = _png16(file).astype(np.uint16).view(np.float16)
    mask = side(file, "co3d")
    try:
        content = regular(mask).read_bytes()
    except FileNotFoundError:
        if isinstance(mask, StoredPath) and mask.place and mask.place.length != WHOLE:  # its archive is missing
            raise
        return depth
    return np.where(_pixels(io.BytesIO(content)) > 0, depth, np.float16(0))


def read_hdf5(file: Path) -> np.ndarray:
    """Read the data set "depth" of an HDF5 file, else the only one."""
    require_package("hdf5", f"'{file}'")
    import h5py

    with h5py.File(source(file)) as archive:
        (depth,) = [archive["depth"]] if "depth" in archive else archive.values()
        if depth.size > MOST_PIXELS:  # of which the file may hold nothing
            raise ValueError(f"its shape is {depth.shape}")
        return np.asarray(depth)


def _npz(file: Path) -> np.ndarray:
    """The array "depth" of an archive, else the only one."""
    with np.load(source(file), allow_pickle=False) as archive:
        (name,) = ["depth"] if "depth" in archive.files else archive.files
        return archive[name]


def _exr(file: Path) -> np.ndarray:
    """The channel Z, else R, Y, or the only one."""
    require_package("exr", f"'{file}'")
    import OpenEXR

    with _real(file) as path, OpenEXR.File(str(path), separate_channels=True) as image:
        channels = image.channels()
        name = next((name for name in ("Z", "R", "Y", *channels) if name in channels), None)
        if name is None:
            raise ValueError("it has no channel")
        return np.array(channels[name].pixels)


def _pfm(file: Path) -> np.ndarray:
    """Portable float map: lines `Pf`, `width height`, `scale` (negative: little-endian), then rows from the bottom."""
    with file.open("rb") as stream:
        if stream.readline().strip() != b"Pf":
            raise ValueError("not a PFM of one channel")
        width, height = map(int, stream.readline().split())
        order = "<" if float(stream.readline()) < 0 else ">"
        return np.frombuffer(stream.read(), f"{order}f4").reshape(height, width)[::-1]


def _colmap(file: Path) -> np.ndarray:
    """COLMAP's dense maps: text `width&height&channels&`, then float32 row by row."""
    width, height, channels, values = file.read_bytes().split(b"&", 3)
    return np.frombuffer(values, "<f4").reshape(int(channels), int(height), int(width))[0]


def require_package(reader: str, what: str) -> None:
    """Raise DataError if `what` needs a package for its reader that is not installed."""
    package, extra = PACKAGES.get(reader, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise DataError(f"{what} needs {package}: pip install 'fastmum[{extra}]'")


# Files that reading a map needs besides itself, by reader.
SIDES: dict[str, Callable[[Path], Path]] = {
    "co3d": lambda file: file.parent.parent / "depth_masks" / f"{file.name.partition('.')[0]}.png",
    "eth3d": lambda file: file.parent.parent.parent / "images" / file.parent.name / file.name,
}
PACKAGES = {"hdf5": ("h5py", "evaluate"), "exr": ("OpenEXR", "exr")}  # of readers, and their extras
READERS: dict[str, Callable[[Path], np.ndarray]] = {
    "png16": _png16, "sunrgbd": _sunrgbd, "co3d": _co3d, "npy": read_npy, "npz": _npz, "hdf5": read_hdf5, "exr": _exr,
    "pfm": _pfm, "colmap": _colmap, "eth3d": _eth3d,
}  # fmt: skip

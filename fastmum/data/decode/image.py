"""Image files: header checks, EXIF orientation, RGB conversion, random crops, scaled JPEG decoding, bicubic resizing.

Every decoder starts with `read_header`, so all agree on files that are missing, truncated or not images. JPEGs with
garbage inside the scan are the exception: Pillow refuses some that DALI decodes. Of a JPEG that was cut and closed with
an end marker again, DALI sees only the part within the crop.

Random crops are drawn before the image size is known: a plan holds a crop as a row of numbers, and `crop_boxes`
converts it to pixels. The distribution is torchvision's `RandomResizedCrop` (the augmentation of the released code): up
to ten attempts at an area and an aspect ratio; the first that fits in the image is placed at random; if none fits, the
largest centred box within the bounds of the aspect ratio.
"""

import errno
import io
import os
import re
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch.nn.functional import interpolate

from fastmum.data.store import StoredPath, source
from fastmum.files import regular

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

# What is read, whatever a file is called. Pillow knows more formats; some start other programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "TGA", "QOI")
# Of `FORMATS`, but not .pfm, which is depth.
IMAGE_SUFFIXES = frozenset(
    """.jpg .jpeg .jpe .jfif .mpo .png .apng .webp .tif .tiff .bmp .gif .pbm .pgm .pnm .ppm .avif .avifs .jp2 .j2k .j2c
    .jpc .jpf .jpx .tga .icb .vda .vst .qoi""".split()  # noqa: SIM905
)
JPEGS = ("JPEG", "MPO")  # an MPO is several JPEGs, of which the first is read
ORIENTATION = 0x0112  # the EXIF tag
BITS_PER_SAMPLE = 258  # the TIFF tag
# EXIF orientation -> the stored image is mirrored in x, mirrored in y, then its axes are swapped.
_TO_UPRIGHT = {
    1: (False, False, False), 2: (True, False, False), 3: (True, True, False), 4: (False, True, False),
    5: (False, False, True), 6: (False, True, True), 7: (True, True, True), 8: (True, False, True),
}  # fmt: skip
UPRIGHT = 1
END = b"\xff\xd9"  # JPEG's end marker
# Entropy-coded data for any JPEG: plain, then after each of the eight restart markers.
_MORE = bytes(range(255)) + b"".join(b"\xff" + bytes([0xD0 + i, *range(255)]) for i in range(8))
CUT_OFF = "cut off, and closed by an end marker"
JPEG_SCALES = (8, 4, 2)  # JPEG's scaled decoding: 8 x 8 pixels become one, ...
# Scaled decoding must leave this many pixels per pixel of the frame and side. With 2, frames differ from full decoding
# by 0.75 grey levels on average (18 photographs; the worst 1.8); with 1 by 1.6 (3.6), and are visibly sharper.
KEPT = 2

ATTEMPTS = 10  # torchvision
# Columns of a crop.
AREAS = slice(0, ATTEMPTS)  # share of the image's area
ASPECTS = slice(ATTEMPTS, 2 * ATTEMPTS)  # width over height
CORNER = slice(2 * ATTEMPTS, 2 * ATTEMPTS + 2)  # position within the free space, x and y, each in [0, 1)
BOUNDS = slice(2 * ATTEMPTS + 2, 2 * ATTEMPTS + 4)  # least and greatest aspect ratio, used if no attempt fits
CROP_WIDTH = 2 * ATTEMPTS + 4


# Of files on a network whose server restarts, or a shortage of memory or file descriptors.
TRANSIENT = frozenset({
    errno.ENOENT, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN,
    errno.EMFILE, errno.ENFILE, errno.ENOMEM,
})  # fmt: skip
being_read: dict[int, Path] = {}  # by thread: the file that it opened last


class FrameError(ValueError):
    """A file that is not a complete image; the message gives the reason in a few words, without the file name.

    `transient`: the file could not be read for one of the reasons in `TRANSIENT`.
    """

    def __init__(self, reason: str, transient: bool = False) -> None:
        super().__init__(reason)
        self.transient = transient


class Header(NamedTuple):
    """An image whose pixels have not been decoded."""

    image: Image.Image
    orientation: int  # EXIF, 1 (as decoded) to 8
    width: int  # of the upright image, in pixels
    height: int
    data: bytes  # the file
    plain: bool  # intact EXIF gives the orientation, so that other decoders find the same


def is_image(name: str) -> bool:
    """Whether a file name is an image's; hidden files (macOS writes some) are not."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def read_file(file: Path) -> bytes:
    """Read a file; raises FrameError if it is missing, empty, unreadable or not `regular`."""
    try:
        being_read[threading.get_ident()] = file
        data = file.read_bytes() if isinstance(file, StoredPath) else regular(file).read_bytes()
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise FrameError(reason, error.errno in TRANSIENT) from None
    if not data:
        raise FrameError("empty")
    return data


def open_image(file: Path | io.BytesIO) -> Image.Image:
    """Open an image of one of `FORMATS` without decoding it.

    FrameError if it is no such image or larger than Pillow's decompression-bomb limit.
    """
    if isinstance(file, Path) and not file.is_file():
        raise FrameError("missing, or no regular file")
    try:
        return Image.open(source(file) if isinstance(file, Path) else file, formats=FORMATS)
    except UnidentifiedImageError:
        raise FrameError(f"not an image of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's readers raise anything on malformed files
        raise _frame_error(error) from None


def _frame_error(error: Exception) -> FrameError:
    return FrameError(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def read_header(source: Path | bytes) -> Header:
    """Open a file or its content without decoding the image; about 20 microseconds for a JPEG.

    FrameError as of `read_file` and `open_image`, or if it is truncated. PNGs are decoded, as their EXIF may come last.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    if data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") + 8 > len(data):  # WebP
        raise FrameError("truncated")
    file = io.BytesIO(data)
    try:
        image = open_image(file)
    except FrameError:
        if data[4:8] != b"ftyp":
            raise
        image = open_image(io.BytesIO(data.replace(b"Exif", b"Skip")))  # libavif refuses an AVIF with damaged EXIF
    # JPEG: cameras append data after the end marker, so it need not be last. Thumbnails have one too, but lie before
    # the scan, where Pillow stops reading.
    jpeg = image.format in JPEGS
    if (jpeg and data.rfind(END, file.tell()) < 0) or (image.format == "PNG" and data.rfind(b"IEND") < 0):
        raise FrameError("truncated")
    try:
        if image.info.get("progressive") and _lacks_scans(data) and is_cut(data):
            raise FrameError(CUT_OFF)
        orientation, plain = _orientation(image)
        if image.format == "TIFF" and orientation != UPRIGHT:
            image.load()  # which turns it upright
            orientation = UPRIGHT
    except Exception as error:  # as in `open_image`
        raise _frame_error(error) from None
    width, height = image.size[::-1] if _TO_UPRIGHT[orientation][2] else image.size
    return Header(image, orientation, width, height, data, plain)


def read_size(file: Path) -> tuple[int, int, int]:
    """Orientation as stored, 1 to 8, and upright width and height; reads no more of most files than the header.

    FrameError as of `open_image`.
    """
    with open_image(file) as image:
        try:
            orientation = _orientation(image)[0]
        except Exception as error:  # as in `open_image`
            raise _frame_error(error) from None
        swap = _TO_UPRIGHT[orientation][2] and image.format != "TIFF"  # whose size Pillow swaps itself
        width, height = image.size[::-1] if swap else image.size
        return orientation, width, height


def _orientation(image: Image.Image) -> tuple[int, bool]:
    """EXIF orientation, 1 where it is damaged or unknown, and whether it is plain (see `Header`)."""
    if image.format == "PNG":
        image.load()  # `getexif` would, if no EXIF comes first; errors of pixels are not those of EXIF
    try:
        orientation = image.getexif().get(ORIENTATION, UPRIGHT)
        if orientation == UPRIGHT or orientation not in _TO_UPRIGHT:
            return UPRIGHT, True
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        return orientation, exif.get(ORIENTATION) == orientation  # else XMP gives it, which DALI does not read
    except Exception:  # as in `open_image`
        return UPRIGHT, False


def _lacks_scans(data: bytes) -> bool:
    """Whether a progressive JPEG has no scan with the last bit of some of its coefficients."""
    file = io.BytesIO(data)
    JpegImageFile(file)
    begin = data.rfind(b"\xff\xda", 0, file.tell())
    components, complete = set[int](), set[tuple[int, int]]()
    for scan in re.finditer(rb"\xff\xda", data[: data.find(END, begin)][begin:]):
        at = begin + scan.end()
        end = at + 3 + 2 * data[at + 2]  # of the list of components and tables
        first, last, bits = data[end : end + 3]
        components.update(data[at + 3 : end : 2])
        if bits & 15 == 0:
            complete |= {(c, k) for c in data[at + 3 : end : 2] for k in range(first, last + 1)}
    return len(complete) < 64 * len(components)


def is_cut(source: Path | bytes) -> bool:
    """Whether a JPEG ends before its pixels do: more data before the end marker then changes them. False otherwise.

    Decodes the image twice, so callers look for pixels of missing data (128 in all channels) first.
    """
    try:
        data = source if isinstance(source, bytes) else read_file(source)
        file = io.BytesIO(data)
        JpegImageFile(file)  # never an MPO, so it stops at the scan
        end = data.find(END, file.tell())
        longer = data[:end] + _MORE + data[end:]
        short, long = (JpegImageFile(io.BytesIO(each)).tobytes() for each in (data, longer))
        return short != long
    except Exception:  # no JPEG, or one that only DALI decodes
        return False


def rgb(header: Header, box: Box | None = None) -> Image.Image:
    """Decode an image, or a box of it, as 8-bit RGB; raises FrameError if Pillow cannot, or of unknown range."""
    image = header.image
    try:
        image.load()
        if image.format in JPEGS:
            width, height = image.size
            corner = set(image.crop((max(width - 2, 0), max(height - 2, 0), width, height)).tobytes())
            if corner in ({128}, {127}) and is_cut(header.data):  # 127: inverted CMYK
                raise FrameError(CUT_OFF)
        region = image.crop(box) if box else image
        if region.mode.startswith("I;16") or (region.mode == "I" and image.format in ("PNG", "PPM")):
            bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
            region = Image.fromarray((np.asarray(region).astype(np.uint32) >> (bits - 8)).clip(0, 255).astype(np.uint8))
        elif region.mode in ("I", "F"):
            raise FrameError("pixels of 32 bits, whose range is unknown: convert it to 8 or 16 bits")
        return region if region.mode == "RGB" else region.convert("RGB")  # convert would copy RGB, too
    except Exception as error:  # as in `open_image`
        raise _frame_error(error) from None


def read_upright(source: Path | bytes) -> np.ndarray:
    """Decode a whole image upright, (h, w, 3) uint8 RGB; FrameError if it cannot be decoded."""
    return turn_upright(read_header(source))


def turn_upright(header: Header) -> np.ndarray:
    """Decode a whole image, at the scale that `Image.draft` was asked for, as `read_upright`."""
    pixels = np.asarray(rgb(header))
    swap = _TO_UPRIGHT[header.orientation][2]
    image = np.empty_like(pixels, shape=(*(pixels.shape[1::-1] if swap else pixels.shape[:2]), 3))
    place(pixels, image, header.orientation, flip=False)
    return image


def draw_crops(
    rng: np.random.Generator, count: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> np.ndarray:
    """Draw crops, (count, CROP_WIDTH) float32.

    `scale` is the range of the share of the image's area, uniform; `aspect` that of width over height, log-uniform.
    """
    crops = rng.random((count, CROP_WIDTH), dtype=np.float32)  # drawn as float32: rounding a float64 could give 1.0
    crops[:, AREAS] = scale[0] + (scale[1] - scale[0]) * crops[:, AREAS]
    low, high = np.log(aspect)
    crops[:, ASPECTS] = np.exp(low + (high - low) * crops[:, ASPECTS])
    crops[:, BOUNDS] = aspect
    return crops


def whole_frames(count: int) -> np.ndarray:
    """Crops that keep the largest centred square, for evaluation; (count, CROP_WIDTH) float32."""
    crops = np.ones((count, CROP_WIDTH), np.float32)
    crops[:, CORNER] = 0
    return crops


def crop_boxes(crops: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes in pixels, (F, 4) int64: left, top, right, bottom; within the image and not empty.

    `crops` (F, CROP_WIDTH); `sizes` (F, 2), width and height of the upright images in pixels.
    """
    crops, sizes = np.asarray(crops, np.float64), np.asarray(sizes, np.float64)
    side = np.sqrt(sizes.prod(1)[:, None] * crops[:, AREAS])
    stretch = np.sqrt(crops[:, ASPECTS])
    attempts = np.rint(np.stack([side * stretch, side / stretch], axis=2))  # (F, ATTEMPTS, 2)
    fits = ((attempts >= 1) & (attempts <= sizes[:, None])).all(2)
    boxes = attempts[np.arange(len(crops)), fits.argmax(1)]
    corners = np.floor(crops[:, CORNER] * (sizes - boxes + 1))

    none = ~fits.any(1)
    if none.any():
        (widths, heights), (low, high) = sizes[none].T, crops[none, BOUNDS].T
        largest = [np.minimum(widths, np.rint(heights * high)), np.minimum(heights, np.rint(widths / low))]
        boxes[none] = np.maximum(np.stack(largest, axis=1), 1)
        corners[none] = (sizes[none] - boxes[none]) // 2
    return np.concatenate([corners, corners + boxes], axis=1).astype(np.int64)


def crop_box(crop: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """`crop_boxes` of one crop (CROP_WIDTH,) in an image of `width` x `height` pixels."""
    left, top, right, bottom = crop_boxes(np.asarray(crop)[None], np.array([[width, height]]))[0].tolist()
    return left, top, right, bottom


def stored_box(box: Box, orientation: int, width: int, height: int) -> Box:
    """Map a box of the upright image of `width` x `height` pixels to the pixels of the file."""
    mirror_x, mirror_y, swap = _TO_UPRIGHT[orientation]
    left, top, right, bottom = box
    if swap:
        left, top, right, bottom = top, left, bottom, right
        width, height = height, width
    if mirror_x:
        left, right = width - right, width - left
    if mirror_y:
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def stored_points(points: np.ndarray, orientation: int, width: int, height: int) -> np.ndarray:
    """Map points (n, 2), centres at +0.5, of the upright image of `width` x `height` pixels to those of the file."""
    mirror_x, mirror_y, swap = _TO_UPRIGHT[orientation]
    if swap:
        points, width, height = points[:, ::-1], height, width
    return np.where([mirror_x, mirror_y], [width, height] - points, points)


def place(frame: np.ndarray, out: np.ndarray, orientation: int, flip: bool) -> None:
    """Turn a stored frame (h, w, 3) upright, mirror it left to right if `flip`, and copy it to `out`."""
    mirror_x, mirror_y, swap = _TO_UPRIGHT[orientation]
    if swap:
        mirror_y ^= flip  # y becomes the horizontal axis
    else:
        mirror_x ^= flip
    frame = frame[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]
    frame = frame.transpose(1, 0, 2) if swap else frame
    if frame.flags.c_contiguous:
        out[...] = frame
    else:
        for channel in range(3):  # four times as fast as pixels of three bytes
            out[..., channel] = frame[..., channel]


def jpeg_scale(width: int, height: int, size: int) -> int:
    """Largest downscaling, 1, 2, 4 or 8, at which a JPEG region of this size may be decoded for a frame of `size`."""
    return next((scale for scale in JPEG_SCALES if min(width, height) >= KEPT * scale * size), 1)


def resize(region: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Bicubic, antialiased resize of (h, w, 3) uint8 to (size, size, 3), or to (height, width) of `size`.

    torch's vectorised uint8 kernel equals Pillow's filter within rounding, in a third to a sixth of Pillow's time, and
    stays in the calling thread. Other torch operations are kept out of decoding: in each Python thread they start a
    thread pool that competes with training.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(region))[None].permute(0, 3, 1, 2)  # channels last in memory
    return interpolate(pixels, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()

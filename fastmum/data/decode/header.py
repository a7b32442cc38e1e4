"""What can be known of an image file before it is decoded: its size, its orientation, and whether it is whole.

Every decoder begins here, so that all agree on files that are missing, cut short or no images; of JPEGs with garbage
inside the scan, Pillow refuses some that DALI decodes.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

ORIENTATION = 0x0112  # the EXIF tag
SIDEWAYS = frozenset({5, 6, 7, 8})  # orientations that exchange width and height


class FrameError(Exception):
    """A file that is no whole image; the message says why in a few words, without the file's name."""


class Header(NamedTuple):
    """An image whose pixels have not been decoded.

    Args:
        image: opened by Pillow.
        orientation: EXIF's, 1 (as stored) to 8.
        width, height: of the upright image, in pixels.
    """

    image: Image.Image
    orientation: int
    width: int
    height: int


def read_file(file: Path) -> bytes:
    """The bytes of a file.

    Raises:
        FrameError: missing, empty, unreadable.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise FrameError("missing") from None
    except OSError as error:
        raise FrameError(error.strerror or str(error)) from None
    if not data:
        raise FrameError("empty")
    return data


def read_header(data: bytes) -> Header:
    """Open an image; about 20 microseconds for a JPEG.

    Raises:
        FrameError: not an image, cut short, or of more pixels than Pillow deems safe.
    """
    webp_length = int.from_bytes(data[4:8], "little") + 8
    if data.startswith(b"RIFF") and webp_length > len(data):
        raise FrameError("truncated")
    file = io.BytesIO(data)
    try:
        image = Image.open(file)
        orientation = image.getexif().get(ORIENTATION, 1)
    except UnidentifiedImageError:
        raise FrameError("not an image") from None
    except Exception as error:  # Pillow's readers raise whatever a malformed file leads them to
        raise FrameError(str(error) or type(error).__name__) from None
    if _is_cut_short(image.format, data, file.tell()):
        raise FrameError("truncated")
    if orientation not in range(1, 9):
        orientation = 1
    width, height = image.size[::-1] if orientation in SIDEWAYS else image.size
    return Header(image, orientation, width, height)


def _is_cut_short(format: str | None, data: bytes, position: int) -> bool:
    if format in ("JPEG", "MPO"):
        # Cameras append data of their own, so the end marker need not be last; thumbnails, which have one too, lie
        # before the scan, where Pillow stops reading.
        return data.rfind(b"\xff\xd9", position) < 0
    return format == "PNG" and data.rfind(b"IEND") < 0

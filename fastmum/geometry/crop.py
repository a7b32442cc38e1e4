"""Crops, resizes and flips that move image, depth, mask and K together, and the frames of VGGT and Reloc3r."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from fastmum.errors import FastmumError
from fastmum.geometry.camera import Camera

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
VGGT_MARGIN = 4.0  # pixels that VGGT resizes beyond the target before the last crop (`safe_bound`)


@dataclass(frozen=True, eq=False)
class View:
    """An image with what is known of its geometry, all of one size."""

    image: np.ndarray  # (H, W, 3) uint8 RGB, upright
    camera: Camera | None = None  # None where the intrinsics are unknown
    depth: np.ndarray | None = None  # (H, W) float32 z-depth, 0 where it is unknown
    mask: np.ndarray | None = None  # (H, W) bool, the object or the valid pixels

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.image.shape[1], self.image.shape[0]


def crop_resize(
    view: View, box: Box | None = None, size: tuple[int, int] | None = None, *,
    resample: Image.Resampling = Image.Resampling.LANCZOS, scale: float | None = None, centred: bool = False,
) -> View:  # fmt: skip
    """Crop, then resize. K moves with the pixels; depth and mask take the nearest pixel. `view` stays as it is.

    Args:
        box: in pixels; parts outside the image are filled with 0 (unknown depth, mask False). None: the whole image.
        size: width and height of the result; None: those of the box.
        resample: filter for the image.
        scale: by which K is multiplied on both axes; None: the ratio of the sizes on each axis. Recipes that round
            the size multiply K by the factor before rounding.
        centred: whether `scale` keeps the centre of the image in the centre, else its upper left corner.
    """
    left, top, right, bottom = box = box or (0, 0, *view.size)
    cropped = right - left, bottom - top
    size, camera = size or cropped, view.camera
    if camera is not None:
        factor = np.array(size) / cropped if scale is None else np.full(2, scale)
        K = camera.K.astype(np.float64)
        K[:2, 2] -= left, top
        K[:2] *= factor[:, None]
        if centred:
            K[:2, 2] += (np.array(size) - factor * cropped) / 2
        camera = Camera(K, camera.camera_from_world, size)
    if box != (0, 0, *view.size):
        view = _apply(view, lambda pixels: _crop(pixels, box))
    if size != cropped:
        image = np.asarray(Image.fromarray(view.image).resize(size, resample))
        depth, mask = (None if x is None else resize_nearest(x, size) for x in (view.depth, view.mask))
        view = View(image, None, depth, mask)
    return replace(view, camera=camera)


def _apply(view: View, change: Callable[[np.ndarray], np.ndarray]) -> View:
    """The view with its image, depth and mask changed."""
    depth, mask = (None if pixels is None else change(pixels) for pixels in (view.depth, view.mask))
    return replace(view, image=change(view.image), depth=depth, mask=mask)


def _crop(values: np.ndarray, box: Box) -> np.ndarray:
    """The box of an array (H, W, ...), 0 outside."""
    left, top, right, bottom = box
    height, width = values.shape[:2]
    out = np.zeros((bottom - top, right - left, *values.shape[2:]), values.dtype)
    rows, columns = slice(*np.clip((top, bottom), 0, height)), slice(*np.clip((left, right), 0, width))
    inside = values[rows, columns]
    out[rows.start - top :, columns.start - left :][: inside.shape[0], : inside.shape[1]] = inside
    return out


def resize_nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a map (H, W) to (width, height) by OpenCV's INTER_NEAREST: source index floor(i * (1 / (n' / n)))."""
    columns, rows = (
        np.minimum((np.arange(new) * (1 / (new / old))).astype(np.int64), old - 1)
        for new, old in zip(size, values.shape[1::-1], strict=True)
    )
    return values.take(rows, 0).take(columns, 1)


def flip(view: View) -> View:
    """Mirror left to right. fx becomes negative, the pose stays: points project to where the pixels went."""
    camera = view.camera
    if camera is not None:
        mirror = np.array([[-1.0, 0, view.size[0]], [0, 1, 0], [0, 0, 1]])
        camera = replace(camera, K=mirror @ camera.K)
    return replace(_apply(view, lambda pixels: np.ascontiguousarray(pixels[:, ::-1])), camera=camera)


def clean_depth(depth: np.ndarray, percentile: float | None = 98.0, max_depth: float | None = None) -> np.ndarray:
    """Set depth above `max_depth`, then above a percentile of all pixels, to 0.

    Zeros count in the percentile, NaN does not and stays (VGGT's `threshold_depth_map`).
    """
    depth = depth.copy()
    if max_depth is not None:
        depth[depth > max_depth] = 0
    if percentile is not None and not np.isnan(depth).all():
        depth[depth > np.nanpercentile(depth, percentile)] = 0
    return depth


def vggt_view(
    view: View, size: tuple[int, int], *, scale: tuple[float, float] = (1.0, 1.0), margin: float = VGGT_MARGIN
) -> View:
    """An image as VGGT trains on it (`process_one_image`): the principal point comes to the centre, the aspect stays.

    The first crop keeps the share `scale` of width and height; training draws min(1, U(0.8, 1.2)) for each. The image
    is resized to `margin` pixels beyond `size` (width, height) before the last crop; training adds
    Triangular(0, 0, 0.3) * max(size). FastmumError if the view has no camera, or a principal point outside the image.
    """
    centre = _centre(view) - 0.5  # VGGT's pixel centres are at integers
    sides = [_around(c, min(int(n * s) / 2, c, n - c)) for c, n, s in zip(centre, view.size, scale, strict=True)]
    view = crop_resize(view, _box(sides))
    factor = max((target + margin) / n for target, n in zip(size, view.size, strict=True))
    width, height = new = math.floor(view.size[0] * factor), math.floor(view.size[1] * factor)
    resample = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC
    larger = max(width / view.size[0], height / view.size[1])
    view = crop_resize(view, None, new, resample=resample, scale=larger)
    sides = [_around(c, min(n / 2, c)) for c, n in zip(_centre(view) - 0.5, size, strict=True)]
    return crop_resize(view, _box([(start, start + n) for (start, _), n in zip(sides, size, strict=True)]))


def reloc3r_view(view: View, size: tuple[int, int], rng: np.random.Generator) -> View:
    """An image as Reloc3r trains on it (`_crop_resize_if_necessary`).

    FastmumError: no intrinsics, or a principal point that is within a fifth of a side from the border.
    `size` is width and height of the result, width >= height; they are exchanged for portraits. `rng` chooses the
    orientation of nearly square images.
    """
    centre = np.round(_centre(view) - 0.5).astype(int).tolist()
    margins = [min(c, n - c) for c, n in zip(centre, view.size, strict=True)]
    if any(5 * margin <= n for margin, n in zip(margins, view.size, strict=True)):
        raise FastmumError(
            f"the principal point {centre} is within a fifth of the border of an image of {view.size} pixels: its "
            "intrinsics may be those of another size"
        )
    view = crop_resize(view, _box([_around(c, margin) for c, margin in zip(centre, margins, strict=True)]))
    width, height = view.size
    nearly_square = 0.9 < height / width < 1.1 and size[0] != size[1]
    if height > 1.1 * width or (nearly_square and rng.integers(2)):
        size = size[1], size[0]
    factor = max(size[0] / width, size[1] / height) + 1e-8
    new = math.floor(width * factor), math.floor(height * factor)
    view = crop_resize(view, None, new, scale=factor, centred=True)
    left, top = round((new[0] - size[0]) / 2), round((new[1] - size[1]) / 2)
    return crop_resize(view, (left, top, left + size[0], top + size[1]))


def _centre(view: View) -> np.ndarray:
    """The principal point (2,), pixels."""
    if view.camera is None:
        raise FastmumError("the image has no intrinsics, and this crop is around the principal point")
    centre = view.camera.K[:2, 2]
    if not ((centre >= 1.5) & (centre <= np.array(view.size) - 1)).all():
        where = f"at the border of the image of {view.size} pixels, or outside"
        raise FastmumError(f"the principal point {centre.tolist()} is {where}")
    return centre


def _around(centre: float, half: float) -> tuple[int, int]:
    """Start and end of 2 * floor(half) pixels around the pixel of a centre."""
    start, half = math.floor(centre) - math.floor(half), math.floor(half)
    return start, start + 2 * half


def _box(sides: list[tuple[int, int]]) -> Box:
    (left, right), (top, bottom) = sides
    return left, top, right, bottom

"""Materials that show something: framed photographs, prints, book spines, windows, doors, house fronts, lamps.

Shapes and arguments as in `textures`; `MATERIALS` names every material there is.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from PIL import Image

from fastmum.scenes.photos import COLOURED, GREY, photo, planes
from fastmum.scenes.textures import (
    Colour,
    Face,
    blend,
    concrete,
    fabric,
    flat,
    leaves,
    marble,
    matter,
    metal,
    noise,
    plaster,
    shade,
    step,
    tiles,
    to_edge,
    wood,
)


def picture(rng: np.random.Generator, face: Face, a: Colour, b: Colour, border: float = 0.03) -> np.ndarray:
    """A framed photograph, cropped to the face and toned; border is the frame's width in metres."""
    coloured = rng.random() < 0.65
    image = photo(str(rng.choice(COLOURED if coloured else GREY)))
    zoom = rng.uniform(0.85, 1.0) * min(image.width / face.w, image.height / face.h)
    wide, high = face.w * zoom, face.h * zoom
    left, top = rng.uniform(0, image.width - wide), rng.uniform(0, image.height - high)
    box = (left, top, left + wide, top + high)
    print_CHW = planes(image.resize((face.w, face.h), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0))
    if coloured:
        print_CHW *= rng.uniform(0.8, 1.15, 3).astype(np.float32)[:, None, None]
    else:
        paper = np.asarray(shade(rng, rng.random(), 0.15, 0.9), np.float32)[:, None, None]
        print_CHW = blend(np.asarray(a, np.float32)[:, None, None] * np.float32(0.45), paper, print_CHW)
    edge = to_edge(face)
    frame = flat(b, 1 + noise(rng, "rough", face.h, face.w) * np.float32(0.06))
    mat_width = border * rng.choice([1.0, 2.2])
    mat = np.full((3, 1, 1), 0.8, np.float32)
    return np.where(edge < border, frame, np.where(edge < mat_width, mat, print_CHW))


def art(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """An abstract print: bands of a few colours along the level lines of a cloud."""
    cloud = noise(rng, "cloud", face.h, face.w) + noise(rng, "rough", face.h, face.w) * np.float32(0.12)
    hue = colorsys.rgb_to_hsv(*a)[0]
    colours = [a, b, *(shade(rng, hue + rng.normal(0, 0.1), 0.3, rng.uniform(0.3, 0.85), 0.1) for _ in range(3))]
    out = flat(colours[0], np.ones_like(cloud))
    levels = np.quantile(cloud, np.sort(rng.uniform(0.1, 0.9, len(colours) - 1)))
    for level, colour in zip(levels, colours[1:], strict=True):
        out = blend(out, np.asarray(colour, np.float32)[:, None, None], step(cloud, level - 0.06, level + 0.06))
    return out


def books(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """A row of spines with bands and titles."""
    out = np.empty((3, face.h, face.w), np.float32)
    left, hue = 0, colorsys.rgb_to_hsv(*a)[0]
    while left < face.w:
        width = max(3, int(rng.uniform(0.018, 0.055) / face.texel))
        colour = (
            b
            if rng.random() < 0.15
            else shade(rng, hue + rng.normal(0, 0.05), rng.uniform(0.1, 0.6), rng.uniform(0.25, 0.85))
        )
        out[:, :, left : left + width] = np.asarray(colour, np.float32)[:, None, None]
        for _ in range(rng.integers(0, 4)):
            top = int(rng.uniform(0.05, 0.9) * face.h)
            out[:, top : top + max(1, int(rng.uniform(0.006, 0.03) / face.texel)), left + 1 : left + width - 1] *= 0.7
        out[:, :, left] *= 0.45
        left += width
    return out * (1 + noise(rng, "rough", face.h, face.w) * np.float32(0.06))


def panes(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """A window: sky above far trees, behind glazing bars of colour b."""
    height = np.linspace(1, 0, face.h, dtype=np.float32)[:, None]
    cloud = noise(rng, "cloud", face.h, face.w)
    sky = blend(flat((0.78, 0.83, 0.88), 1 + 0 * cloud), flat((0.48, 0.62, 0.82), 1 + 0 * cloud), height)
    sky = blend(sky, np.full((3, 1, 1), 0.88, np.float32), step(cloud, 0.2, 1.4))
    trees = flat(shade(rng, 0.27, 0.35, 0.45), 1 + noise(rng, "rough", face.h, face.w) * np.float32(0.18))
    out = blend(sky, trees, step(rng.uniform(0.2, 0.45) + 0.08 * cloud - height, -0.02, 0.04))
    frame = flat(b, np.ones((face.h, face.w), np.float32))
    bar = to_edge(face) < 0.05
    for size, axis in ((face.h, 0), (face.w, 1)):
        pitch = size / max(1, round(size * face.texel / 0.6))
        place = np.abs((np.arange(size) + pitch / 2) % pitch - pitch / 2) * face.texel
        bar = bar | np.expand_dims(place < 0.02, 1 - axis)
    return np.where(bar, frame, out)


def door(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """A panelled door or cabinet front of colour a, its grooves shaded."""
    out = wood(rng, face, a, b, plank=3.0)
    rows, columns = max(1, round(face.h * face.texel / 0.6)), max(1, round(face.w * face.texel / 0.5))
    y = np.abs((np.arange(face.h) + 0.5) / face.h * rows % 1 - 0.5) * (face.h / rows * face.texel)
    x = np.abs((np.arange(face.w) + 0.5) / face.w * columns % 1 - 0.5) * (face.w / columns * face.texel)
    inset = np.minimum(
        (face.h / rows * face.texel / 2 - y)[:, None], (face.w / columns * face.texel / 2 - x)[None]
    ).astype(np.float32)
    return out * (1 - 0.4 * np.exp(-(((inset - np.float32(0.06)) / np.float32(0.012)) ** 2)))


def facade(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """A house front: rows of windows in render of colour a, their frames of colour b."""
    out = plaster(rng, face, a, b)
    pitch_x, pitch_y = (int(rng.uniform(1.0, 1.5) / face.texel) for _ in range(2))
    wide, high = int(pitch_x * 0.45), int(pitch_y * 0.6)
    if min(wide, high) < 3:
        return out
    for top in range(int(0.2 * pitch_y), face.h - high, pitch_y):
        for left in range(int(0.3 * pitch_x), face.w - wide, pitch_x):
            frame = max(1, wide // 10)
            out[:, top : top + high, left : left + wide] = np.asarray(b, np.float32)[:, None, None] * np.float32(0.8)
            pane = Face(high - 2 * frame, wide - 2 * frame, face.texel)
            glass = marble(rng, pane, (0.32, 0.38, 0.46), (0.5, 0.58, 0.66))
            out[:, top + frame : top + high - frame, left + frame : left + wide - frame] = glass
    return out


def glow(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """A lamp shade, lit from within."""
    return flat(a, 1 + noise(rng, "rough", face.h, face.w) * np.float32(0.04))


MATERIALS: dict[str, Callable[..., np.ndarray]] = {
    f.__name__: f
    for f in (plaster, concrete, wood, marble, tiles, fabric, metal, matter, leaves)
    + (picture, art, books, panes, door, facade, glow)
}

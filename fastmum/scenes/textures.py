"""Materials: the look of a surface before it is lit, painted from photographs and noise.

Every material draws a new image for one face, with random crops, placement and colours and in metres, so that nothing
repeats and detail has the same size everywhere. `MATERIALS` lists them by name.

Shapes: a material returns [3, h, w] float32 in 0..1, display space (the square root of reflectance). Noise fields are
[FIELD, FIELD] float32, periodic, zero mean, unit deviation.
"""

import colorsys
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastmum.scenes.cache import ScenesError

FIELD = 1024  # side of a noise field; a power of two, so that a bit mask wraps an index

# Photographs in scikit-image's wheel: subjects for pictures, and plain surfaces.
COLOURED = "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg", "ihc.png"
GREY = "camera.png", "moon.png", "cell.png", "coins.png", "page.png", "text.png"
GROUND = "brick.png", "grass.png", "gravel.png"

Colour = tuple[float, float, float]


class Face(NamedTuple):
    """A face to paint: h x w texels of `texel` metres a side."""

    h: int
    w: int
    texel: float


def photo_folder() -> Path:
    """The data folder of scikit-image; ScenesError if the package or a photograph is missing."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ScenesError("the embedded scenes need scikit-image's photographs: pip install scikit-image")
    folder = Path(spec.origin).parent / "data"
    if missing := [name for name in (*COLOURED, *GREY, *GROUND) if not (folder / name).is_file()]:
        raise ScenesError(f"{folder} lacks {', '.join(missing)}: reinstall scikit-image from its wheel")
    return folder


@cache
def photo(name: str) -> Image.Image:
    """A photograph, RGB, at most 640 px a side, contrast stretched so that none is dull or black."""
    image = Image.open(photo_folder() / name).convert("RGB")
    image.thumbnail((640, 640), Image.Resampling.BOX)
    rgb = np.asarray(image, dtype=np.float32)
    low, high = np.percentile(rgb, (1.0, 99.0))
    return Image.fromarray((np.clip((rgb - low) / (high - low), 0.0, 1.0) * 210.0 + 22.0).astype(np.uint8))


@cache
def field(kind: str) -> np.ndarray:
    """A noise field whose amplitude falls as a power of frequency: "rough", "cloud", or "grain", stretched along x."""
    seed, slope, stretch, lowest = {"rough": (1, 1.1, 1, 5), "cloud": (2, 1.9, 1, 1.5), "grain": (3, 1.2, 14, 8)}[kind]
    white = np.random.default_rng([91, seed]).standard_normal((FIELD, FIELD), dtype=np.float32)
    fy = np.fft.fftfreq(FIELD)[:, None] * FIELD
    fx = np.fft.rfftfreq(FIELD)[None, :] * (FIELD * stretch)
    frequency = np.sqrt(fx * fx + fy * fy)  # cycles per field
    gain = np.where(frequency >= lowest, np.maximum(frequency, 1.0) ** -slope, 0.0)
    noise = np.fft.irfft2(np.fft.rfft2(white) * gain, s=(FIELD, FIELD))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def shade(rng: np.random.Generator, hue: float, saturation: float, value: float, spread: float = 0.04) -> Colour:
    """A colour near these HSV values in 0..1, each with noise of about `spread`."""
    hue, saturation, value = np.array([hue, saturation, value]) + rng.normal(0, 1, 3) * [spread / 2, spread, spread]
    return colorsys.hsv_to_rgb(hue % 1.0, float(np.clip(saturation, 0, 0.9)), float(np.clip(value, 0.12, 0.93)))


def noise(rng: np.random.Generator, kind: str, h: int, w: int) -> np.ndarray:
    """A random crop [h, w] of a noise field, randomly mirrored."""
    y0, x0 = rng.integers(0, FIELD, 2)
    step_y, step_x = rng.choice([-1, 1], 2)
    rows = (y0 + step_y * np.arange(h)) & (FIELD - 1)
    columns = (x0 + step_x * np.arange(w)) & (FIELD - 1)
    return field(kind)[rows].take(columns, axis=1)


def column(colour: Colour) -> np.ndarray:
    """A colour as [3, 1, 1] float32."""
    return np.asarray(colour, np.float32)[:, None, None]


def flat(colour: Colour, tone_HW: np.ndarray) -> np.ndarray:
    """One colour times a tone [h, w]."""
    return column(colour) * tone_HW[None]


def blend(a_CHW: np.ndarray, b_CHW: np.ndarray, weight_HW: np.ndarray) -> np.ndarray:
    """a at weight 0, b at weight 1; either may be [3, 1, 1]."""
    return a_CHW + (b_CHW - a_CHW) * weight_HW


def step(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """A smooth ramp from 0 at `low` to 1 at `high`."""
    t = np.clip((x - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def plaster(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """Plaster with stains of colour b."""
    cloud, rough = noise(rng, "cloud", face.h, face.w), noise(rng, "rough", face.h, face.w)
    tone = 1 + rough * np.float32(rng.uniform(0.03, 0.07)) + cloud * np.float32(0.05)
    stain = step(cloud - rough * np.float32(0.35), rng.uniform(0.2, 0.9), rng.uniform(1.2, 2.0))
    return blend(flat(a, tone), flat(b, tone), stain * np.float32(rng.uniform(0.4, 0.9)))


def concrete(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """Concrete panels with drips of colour b."""
    tone = 1 + noise(rng, "rough", face.h, face.w) * np.float32(0.08) + noise(rng, "cloud", face.h, face.w) * 0.07
    drips = noise(rng, "grain", face.w, face.h).T
    tone = tone + drips * np.float32(0.04)
    for size, axis in ((face.h, 0), (face.w, 1)):
        pitch = rng.uniform(0.9, 1.6) / face.texel
        place = (np.arange(size) + rng.uniform(0, pitch)) % pitch
        joint = 1 - 0.35 * np.exp(-((place - pitch / 2) ** 2) / 4.0)
        tone = tone * np.expand_dims(joint.astype(np.float32), 1 - axis)
    return blend(flat(a, tone), flat(b, tone), step(drips, 0.3, 2.0) * np.float32(0.6))


def wood(rng: np.random.Generator, face: Face, a: Colour, b: Colour, plank: float | None = None) -> np.ndarray:
    """Boards along the longer side with separate grain, tone and length; `plank` is their width in metres."""
    if face.h > face.w:
        return wood(rng, Face(face.w, face.h, face.texel), a, b, plank).transpose(0, 2, 1)
    pitch = max(4, round((plank or rng.uniform(0.09, 0.22)) / face.texel))
    grain, tone, tint = (np.empty((face.h, face.w), np.float32) for _ in range(3))
    for top in range(-int(rng.integers(0, pitch)), face.h, pitch):
        rows = slice(max(top, 0), min(top + pitch, face.h))
        count = rows.stop - rows.start
        grain[rows] = noise(rng, "grain", count, face.w)
        tone[rows], tint[rows] = 1 + 0.07 * rng.standard_normal(), rng.uniform(-0.5, 0.7)
        end = int(rng.uniform(0.1, 2.4) / face.texel)
        while end < face.w:
            tone[rows, end:], tint[rows, end:] = 1 + 0.07 * rng.standard_normal(), rng.uniform(-0.5, 0.7)
            tone[rows, end : end + 2] *= 0.6
            end += int(rng.uniform(0.8, 2.4) / face.texel)
        tone[rows.start] *= 0.62
        tone[rows.start + 1 : min(rows.start + 2, rows.stop)] *= 0.85
    tone *= 1 + grain * np.float32(0.05) + noise(rng, "cloud", face.h, face.w) * np.float32(0.04)
    return blend(flat(a, tone), flat(b, tone), np.clip(tint + grain * np.float32(0.3), 0, 1))


def marble(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """Marble with veins of colour b."""
    cloud, bend = noise(rng, "cloud", face.h, face.w), noise(rng, "rough", face.h, face.w)
    veins = np.abs(cloud * np.float32(1.3) + bend * np.float32(0.22) + np.float32(rng.uniform(-0.4, 0.4)))
    fine = np.abs(noise(rng, "cloud", face.h, face.w) * np.float32(2.0) + bend * np.float32(0.3))
    weight = np.maximum(1 - veins * 3, 0) * np.float32(0.8) + np.maximum(1 - fine * 4, 0) * np.float32(0.35)
    tone = 1 + bend * np.float32(0.025) + cloud * np.float32(0.03)
    return blend(flat(a, tone), flat(b, tone), np.minimum(weight, 1))


def tiles(
    rng: np.random.Generator, face: Face, a: Colour, b: Colour, size: tuple[float, float], bond: float = 0.0,
    chequered: bool = False,
) -> np.ndarray:  # fmt: skip
    """Tiles or bricks of `size` (width, height) metres, all different; each row is shifted by `bond` of a tile."""
    wide, high = float(size[0] / face.texel), float(size[1] / face.texel)
    y = np.arange(face.h, dtype=np.float32) + np.float32(rng.uniform(0, high))
    row = np.floor(y / high).astype(np.int64)
    x_HW = np.arange(face.w, dtype=np.float32)[None] + (rng.uniform(0, wide) + row * bond * wide)[:, None].astype("f4")
    column_HW = np.floor(x_HW / np.float32(wide)).astype(np.int64)
    count = int(column_HW.max()) + 1
    index = row[:, None] * count + column_HW
    many = (int(row.max()) + 1) * count
    tone, tint = (1 + 0.08 * rng.standard_normal(many)).astype("f4"), rng.uniform(-0.3, 1.0, many).astype("f4")
    if chequered:
        tint = ((np.arange(many) // count + np.arange(many) % count) % 2).astype("f4")
    shift = rng.integers(0, FIELD * FIELD, many)  # each tile has another crop of the field
    place = (np.arange(face.h)[:, None] * FIELD + np.arange(face.w)[None] + shift[index]) & (FIELD * FIELD - 1)
    rough = field("rough").ravel()[place]
    edge_x = np.abs(x_HW - (column_HW.astype("f4") + np.float32(0.5)) * np.float32(wide))
    edge_y = np.abs(y - (row + 0.5) * high).astype("f4")[:, None]
    joint = max(0.9, 0.006 / face.texel)
    inside = step(wide / 2 - edge_x, joint * 0.5, joint * 1.6) * step(high / 2 - edge_y, joint * 0.5, joint * 1.6)
    weight = np.clip(tint[index] + rough * np.float32(0.12), 0, 1)
    level = tone[index] * (1 + rough * np.float32(0.06)) + noise(rng, "cloud", face.h, face.w) * np.float32(0.04)
    grout = flat(shade(rng, 0.1, 0.1, rng.uniform(0.45, 0.7)), 1 + rough * np.float32(0.05))
    return blend(grout, blend(flat(a, level), flat(b, level), weight), inside)


def fabric(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """Woven stripes of both colours."""
    stripes = []
    for size in (face.w, face.h):
        profile, place = np.zeros(size, np.float32), 0.0
        while place < size:
            width = rng.uniform(0.02, 0.22) / face.texel
            profile[int(place) : int(place + width) + 1] = rng.choice([0.0, 0.15, 0.5, 1.0])
            place += width
        stripes.append(profile)
    crossing = rng.choice([0.0, 0.5])
    weight = stripes[0][None] * np.float32(1 - crossing) + stripes[1][:, None] * np.float32(crossing)
    tone = 1 + noise(rng, "rough", face.h, face.w) * np.float32(0.08) + noise(rng, "cloud", face.h, face.w) * 0.07
    return blend(flat(a, tone), flat(b, tone), weight)


def metal(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """Painted metal, worn to colour b."""
    rough = noise(rng, "rough", face.h, face.w)
    worn = step(noise(rng, "cloud", face.h, face.w) + rough * np.float32(0.4), rng.uniform(0.4, 1.2), 1.6)
    tone = 1 + noise(rng, "grain", face.w, face.h).T * np.float32(0.05) + rough * np.float32(0.03)
    return blend(flat(a, tone), flat(b, 1 + rough * np.float32(0.15)), worn)


def ground(rng: np.random.Generator, face: Face, a: Colour, b: Colour, name: str) -> np.ndarray:
    """Grass, gravel or brick, quilted from random patches of a photograph."""
    source = np.asarray(photo(name).convert("L"), np.float32) / 255
    source, side = source - source.mean(), 160
    ramp = np.sin((np.arange(side) + 0.5) * np.pi / side).astype(np.float32)  # squares of half-shifted ramps sum to 1
    window = ramp[:, None] * ramp[None]
    tone = np.zeros((face.h + 2 * side, face.w + 2 * side), np.float32)
    for top in range(0, face.h + side, side // 2):
        for left in range(0, face.w + side, side // 2):
            y, x = rng.integers(0, np.array(source.shape) - side)
            patch = source[y : y + side, x : x + side][:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
            tone[top : top + side, left : left + side] += patch * window
    tone = 1 + np.float32(1.1) * tone[side : side + face.h, side : side + face.w]
    cloud = noise(rng, "cloud", face.h, face.w)
    return blend(flat(a, tone), flat(b, tone), step(cloud, -0.8, 1.2)) * (1 + cloud * np.float32(0.06))


def leaves(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """Clumps of leaves."""
    clump = noise(rng, "rough", face.h, face.w)
    tone = 1 + clump * np.float32(0.13) + noise(rng, "cloud", face.h, face.w) * np.float32(0.10)
    return blend(flat(a, tone), flat(b, tone), step(clump, -1.2, 2.2))


def to_edge(face: Face) -> np.ndarray:
    """Metres from each texel to the nearest edge of the face: [h, w] float32."""
    y, x = (np.minimum(np.arange(n) + 0.5, n - np.arange(n) - 0.5) * face.texel for n in (face.h, face.w))
    return np.minimum(y[:, None], x[None]).astype(np.float32)


def worn_edges(face: Face, depth: float = 0.2, width: float = 0.012) -> np.ndarray:
    """A tone [h, w] that darkens a face towards its edges."""
    return 1 - np.float32(depth) * np.exp(to_edge(face) * np.float32(-1 / width))


def picture(rng: np.random.Generator, face: Face, a: Colour, b: Colour, border: float = 0.03) -> np.ndarray:
    """A framed photograph, cropped to the face and toned; `border` is the frame's width in metres."""
    coloured = rng.random() < 0.65
    image = photo(str(rng.choice(COLOURED if coloured else GREY)))
    zoom = rng.uniform(0.85, 1.0) * min(image.width / face.w, image.height / face.h)
    wide, high = face.w * zoom, face.h * zoom
    left, top = rng.uniform(0, image.width - wide), rng.uniform(0, image.height - high)
    box = left, top, left + wide, top + high
    image = image.resize((face.w, face.h), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    print_CHW = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1), dtype=np.float32) * np.float32(1 / 255)
    if coloured:
        print_CHW *= rng.uniform(0.8, 1.15, 3).astype(np.float32)[:, None, None]
    else:
        print_CHW = blend(column(a) * np.float32(0.45), column(shade(rng, rng.random(), 0.15, 0.9)), print_CHW)
    frame = flat(b, 1 + noise(rng, "rough", face.h, face.w) * np.float32(0.06))
    edge, mat_width = to_edge(face), border * rng.choice([1.0, 2.2])
    return np.where(edge < border, frame, np.where(edge < mat_width, np.float32(0.8), print_CHW))


def art(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """An abstract print of five colours."""
    cloud = noise(rng, "cloud", face.h, face.w) + noise(rng, "rough", face.h, face.w) * np.float32(0.12)
    hue = colorsys.rgb_to_hsv(*a)[0]
    colours = [a, b, *(shade(rng, hue + rng.normal(0, 0.1), 0.3, rng.uniform(0.3, 0.85), 0.1) for _ in range(3))]
    out = flat(colours[0], np.ones_like(cloud))
    for level, colour in zip(np.quantile(cloud, np.sort(rng.uniform(0.1, 0.9, 4))), colours[1:], strict=True):
        out = blend(out, column(colour), step(cloud, level - 0.06, level + 0.06))
    return out


def books(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """Spines of books."""
    out = np.empty((3, face.h, face.w), np.float32)
    left, hue = 0, colorsys.rgb_to_hsv(*a)[0]
    while left < face.w:
        width = max(3, int(rng.uniform(0.018, 0.055) / face.texel))
        colour = b
        if rng.random() >= 0.15:
            colour = shade(rng, hue + rng.normal(0, 0.05), rng.uniform(0.1, 0.6), rng.uniform(0.25, 0.85))
        out[:, :, left : left + width] = column(colour)
        for _ in range(rng.integers(0, 4)):
            top = int(rng.uniform(0.05, 0.9) * face.h)
            out[:, top : top + max(1, int(rng.uniform(0.006, 0.03) / face.texel)), left + 1 : left + width - 1] *= 0.7
        out[:, :, left] *= 0.45
        left += width
    return out * (1 + noise(rng, "rough", face.h, face.w) * np.float32(0.06))


def panes(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """A window with sky and trees, bars of colour b."""
    height = np.linspace(1, 0, face.h, dtype=np.float32)[:, None]
    cloud = noise(rng, "cloud", face.h, face.w)
    sky = blend(flat((0.78, 0.83, 0.88), 1 + 0 * cloud), flat((0.48, 0.62, 0.82), 1 + 0 * cloud), height)
    sky = blend(sky, column((0.88, 0.88, 0.88)), step(cloud, 0.2, 1.4))
    trees = flat(shade(rng, 0.27, 0.35, 0.45), 1 + noise(rng, "rough", face.h, face.w) * np.float32(0.18))
    out = blend(sky, trees, step(rng.uniform(0.2, 0.45) + 0.08 * cloud - height, -0.02, 0.04))
    bar = to_edge(face) < 0.05
    for size, axis in ((face.h, 0), (face.w, 1)):
        pitch = size / max(1, round(size * face.texel / 0.6))
        place = np.abs((np.arange(size) + pitch / 2) % pitch - pitch / 2) * face.texel
        bar = bar | np.expand_dims(place < 0.02, 1 - axis)
    return np.where(bar, column(b), out)


def door(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """A panelled door."""
    out = wood(rng, face, a, b, plank=3.0)
    rows, columns = max(1, round(face.h * face.texel / 0.6)), max(1, round(face.w * face.texel / 0.5))
    to_groove = []
    for size, panels in ((face.h, rows), (face.w, columns)):
        middle = np.abs((np.arange(size) + 0.5) / size * panels % 1 - 0.5) * (size / panels * face.texel)
        to_groove.append(size / panels * face.texel / 2 - middle)
    inset = np.minimum(to_groove[0][:, None], to_groove[1][None]).astype(np.float32)
    return out * (1 - 0.4 * np.exp(-(((inset - np.float32(0.06)) / np.float32(0.012)) ** 2)))


def facade(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """A plastered wall with windows."""
    out = plaster(rng, face, a, b)
    pitch_x, pitch_y = (int(rng.uniform(1.0, 1.5) / face.texel) for _ in range(2))
    wide, high = int(pitch_x * 0.45), int(pitch_y * 0.6)
    if min(wide, high) < 3:
        return out
    for top in range(int(0.2 * pitch_y), face.h - high, pitch_y):
        for left in range(int(0.3 * pitch_x), face.w - wide, pitch_x):
            frame = max(1, wide // 10)
            out[:, top : top + high, left : left + wide] = column(b) * np.float32(0.8)
            pane = Face(high - 2 * frame, wide - 2 * frame, face.texel)
            glass = marble(rng, pane, (0.32, 0.38, 0.46), (0.5, 0.58, 0.66))
            out[:, top + frame : top + high - frame, left + frame : left + wide - frame] = glass
    return out


def glow(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """The shade of a lamp."""
    return flat(a, 1 + noise(rng, "rough", face.h, face.w) * np.float32(0.04))


MATERIALS: dict[str, Callable[..., np.ndarray]] = {
    f.__name__: f
    for f in (plaster, concrete, wood, marble, tiles, fabric, metal, ground, leaves)
    + (picture, art, books, panes, door, facade, glow)
}

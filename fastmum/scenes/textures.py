"""Materials: what a surface looks like before light falls on it.

Every material draws a fresh picture for one face: its own crop, placement and colours, in the face's own metres, so
that nothing repeats and detail has about the same size everywhere.

Shapes: C = 3 colours first; a material returns [3, h, w] float32 in 0..1, display space (the square root of
reflectance). A `Face` says how many texels and how large one is.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

from fastmum.scenes.photos import FIELD, field, photo

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Face:
    """A face to paint: h and w texels, `texel` metres a side."""

    h: int
    w: int
    texel: float


def shade(rng: np.random.Generator, hue: float, saturation: float, value: float, spread: float = 0.04) -> Colour:
    """A colour near (hue, saturation, value), display space."""
    hue, saturation, value = np.array([hue, saturation, value]) + rng.normal(0, 1, 3) * [spread / 2, spread, spread]
    return colorsys.hsv_to_rgb(hue % 1.0, float(np.clip(saturation, 0, 0.9)), float(np.clip(value, 0.12, 0.93)))


def noise(rng: np.random.Generator, kind: str, h: int, w: int) -> np.ndarray:
    """A crop [h, w] of a noise field at a random place, randomly mirrored."""
    y0, x0 = rng.integers(0, FIELD, 2)
    step_y, step_x = rng.choice([-1, 1], 2)
    rows = (y0 + step_y * np.arange(h)) & (FIELD - 1)
    columns = (x0 + step_x * np.arange(w)) & (FIELD - 1)
    return field(kind)[rows].take(columns, axis=1)


def flat(colour: Colour, tone_HW: np.ndarray) -> np.ndarray:
    """A colour times a tone: [3, h, w]."""
    return np.asarray(colour, np.float32)[:, None, None] * tone_HW[None]


def blend(a_CHW: np.ndarray, b_CHW: np.ndarray, weight_HW: np.ndarray) -> np.ndarray:
    """From a (weight 0) to b (weight 1); either may be a colour [3, 1, 1]."""
    return a_CHW + (b_CHW - a_CHW) * weight_HW


def step(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """A smooth ramp from 0 at `low` to 1 at `high`."""
    t = np.clip((x - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def plaster(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """Paint on plaster: two near colours in clouds, fine roughness, a few stains."""
    cloud = noise(rng, "cloud", face.h, face.w)
    rough = noise(rng, "rough", face.h, face.w)
    tone = 1 + rough * np.float32(rng.uniform(0.03, 0.07)) + cloud * np.float32(0.05)
    stain = step(cloud - rough * np.float32(0.35), rng.uniform(0.2, 0.9), rng.uniform(1.2, 2.0))
    return blend(flat(a, tone), flat(b, tone), stain * np.float32(rng.uniform(0.4, 0.9)))


def concrete(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """Poured panels with joints, pores and drips."""
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
    """Boards along the longer side, each with its own grain, tone and length; plank is their width in metres."""
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
    """Veins: the level lines of warped noise."""
    cloud = noise(rng, "cloud", face.h, face.w)
    bend = noise(rng, "rough", face.h, face.w)
    veins = np.abs(cloud * np.float32(1.3) + bend * np.float32(0.22) + np.float32(rng.uniform(-0.4, 0.4)))
    fine = np.abs(noise(rng, "cloud", face.h, face.w) * np.float32(2.0) + bend * np.float32(0.3))
    weight = np.maximum(1 - veins * 3, 0) * np.float32(0.8) + np.maximum(1 - fine * 4, 0) * np.float32(0.35)
    tone = 1 + bend * np.float32(0.025) + cloud * np.float32(0.03)
    return blend(flat(a, tone), flat(b, tone), np.minimum(weight, 1))


def tiles(
    rng: np.random.Generator,
    face: Face,
    a: Colour,
    b: Colour,
    size: tuple[float, float],
    bond: float = 0.0,
    chequered: bool = False,
) -> np.ndarray:
    """Tiles or bricks of `size` (width, height) metres; rows shift by `bond` of a tile; each tile has its own face."""
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
    shift = rng.integers(0, FIELD * FIELD, many)  # each tile is cut from elsewhere in the field
    flat_field = field("rough").ravel()
    place = (np.arange(face.h)[:, None] * FIELD + np.arange(face.w)[None] + shift[index]) & (FIELD * FIELD - 1)
    rough = flat_field[place]
    edge_x = np.abs(x_HW - (column_HW.astype("f4") + np.float32(0.5)) * np.float32(wide))
    edge_y = np.abs(y - (row + 0.5) * high).astype("f4")[:, None]
    joint = max(0.9, 0.006 / face.texel)
    inside = step(wide / 2 - edge_x, joint * 0.5, joint * 1.6) * step(high / 2 - edge_y, joint * 0.5, joint * 1.6)
    weight = np.clip(tint[index] + rough * np.float32(0.12), 0, 1)
    level = tone[index] * (1 + rough * np.float32(0.06)) + noise(rng, "cloud", face.h, face.w) * np.float32(0.04)
    grout = flat(shade(rng, 0.1, 0.1, rng.uniform(0.45, 0.7)), 1 + rough * np.float32(0.05))
    return blend(grout, blend(flat(a, level), flat(b, level), weight), inside)


def fabric(rng: np.random.Generator, face: Face, a: Colour, b: Colour) -> np.ndarray:
    """A woven cloth: irregular stripes both ways, some fading."""
    stripes = []
    for size in (face.w, face.h):
        profile = np.zeros(size, np.float32)
        place = 0.0
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
    """Brushed or painted metal with worn patches."""
    rough = noise(rng, "rough", face.h, face.w)
    worn = step(noise(rng, "cloud", face.h, face.w) + rough * np.float32(0.4), rng.uniform(0.4, 1.2), 1.6)
    tone = 1 + noise(rng, "grain", face.w, face.h).T * np.float32(0.05) + rough * np.float32(0.03)
    return blend(flat(a, tone), flat(b, 1 + rough * np.float32(0.15)), worn)


def matter(rng: np.random.Generator, face: Face, a: Colour, b: Colour, name: str) -> np.ndarray:
    """Ground of a photograph (grass, gravel, brick) quilted from patches that never meet the same neighbours."""
    source = np.asarray(photo(name).convert("L"), np.float32) / 255
    source = source - source.mean()
    side = 160
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
    """Clipped foliage: clumps of light and dark green."""
    clump = noise(rng, "rough", face.h, face.w)
    tone = 1 + clump * np.float32(0.13) + noise(rng, "cloud", face.h, face.w) * np.float32(0.10)
    return blend(flat(a, tone), flat(b, tone), step(clump, -1.2, 2.2))


def to_edge(face: Face) -> np.ndarray:
    """Metres from each texel to the nearest edge of the face: [h, w] float32."""
    y, x = (np.minimum(np.arange(n) + 0.5, n - np.arange(n) - 0.5) * face.texel for n in (face.h, face.w))
    return np.minimum(y[:, None], x[None]).astype(np.float32)


def worn_edges(face: Face, depth: float = 0.2, width: float = 0.012) -> np.ndarray:
    """A tone [h, w] that darkens a face towards its edges, as dirt and rounded corners do."""
    return 1 - np.float32(depth) * np.exp(to_edge(face) * np.float32(-1 / width))

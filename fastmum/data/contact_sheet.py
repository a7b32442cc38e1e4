"""Contact sheet of sampled sequences with their depth (after the supplement's Fig. 5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastmum.data.depth import DepthFormat, read_depth
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifest

COLUMNS = 12  # a sequence of the most views, 24, takes two lines
VIEWS = (2, 24)  # supplement, "Sampling"
GAP, LABEL = 2, 16  # pixels between tiles, height of a line of text
MISSING = (200, 40, 40)
UNKNOWN = (40, 40, 90)  # pixels without depth


def contact_sheet(manifest: Manifest, sequences: int = 12, seed: int = 0, tile: int = 96) -> Image.Image:
    """Random sequences, each with as many random frames as training might draw, in order; depth below its frames.

    Args:
        manifest: to draw from.
        sequences: to show, all if there are fewer.
        seed: of the draws.
        tile: side of a frame in pixels. The centre square of a frame is shown; unreadable files are red.
    """
    rng = np.random.default_rng(seed)
    count = min(sequences, manifest.num_sequences)
    strips = [_strip(manifest, i, rng, tile) for i in np.sort(rng.choice(manifest.num_sequences, count, replace=False))]
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _strip(manifest: Manifest, sequence: int, rng: np.random.Generator, tile: int) -> Image.Image:
    """A line of text, then the frames of one sequence, every line of frames followed by its depth if there is any."""
    first, end = manifest.starts[sequence : sequence + 2].tolist()
    views = min(int(rng.integers(VIEWS[0], VIEWS[1] + 1)), end - first)
    rows = first + np.sort(rng.choice(end - first, views, replace=False))
    depths = [manifest.depth_file(row) for row in rows.tolist()]
    lines = 2 if any(depths) else 1
    pitch = tile + GAP
    strip = Image.new("RGB", (COLUMNS * pitch - GAP, LABEL + -(-views // COLUMNS) * lines * pitch + GAP), "white")
    dataset = manifest.datasets[manifest.dataset_of[sequence]]
    text = f"{dataset}: {manifest.sequence_name(sequence)} ({views} of {end - first})"
    plain = text.encode("latin-1", "replace").decode("latin-1")  # what the built-in font can draw
    ImageDraw.Draw(strip).text((1, 1), plain, fill="black", font=ImageFont.load_default())
    for i, (file, depth) in enumerate(zip(manifest.files(rows), depths, strict=True)):
        left, top = i % COLUMNS * pitch, LABEL + i // COLUMNS * lines * pitch
        strip.paste(_thumbnail(file, tile), (left, top))
        if depth is not None:
            strip.paste(_depth_thumbnail(*depth, tile), (left, top + pitch))
    return strip


def _thumbnail(file: Path, tile: int) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.draft("RGB", (2 * tile, 2 * tile))  # decodes large JPEGs at a fraction of their size
            return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (tile, tile))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return Image.new("RGB", (tile, tile), MISSING)


def _depth_thumbnail(file: Path, format: DepthFormat, tile: int) -> Image.Image:
    """Inverse depth in grey, near is bright, between the 2nd and 98th percentile of the map."""
    try:
        depth = read_depth(file, format)
    except DataError:
        return Image.new("RGB", (tile, tile), MISSING)
    known = depth > 0
    inverse = 1 / np.where(known, depth, 1)
    low, high = np.percentile(inverse[known], (2, 98)) if known.any() else (0, 1)
    grey = 255 * np.clip((inverse - low) / max(high - low, 1e-9), 0, 1)[..., None]
    image = Image.fromarray(np.where(known[..., None], grey, UNKNOWN).astype(np.uint8))
    return ImageOps.fit(image, (tile, tile), Image.Resampling.NEAREST)

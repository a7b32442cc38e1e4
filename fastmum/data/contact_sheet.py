"""A contact sheet of sampled sequences (after the supplement's Fig. 5): what a model gets to see of a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastmum.data.manifest import Manifest

COLUMNS = 12  # a sequence of the most views, 24, takes two lines
VIEWS = (2, 24)  # supplement, "Sampling"
GAP, LABEL = 2, 16  # pixels between tiles, height of a line of text
MISSING = (200, 40, 40)


def contact_sheet(manifest: Manifest, sequences: int = 12, seed: int = 0, tile: int = 96) -> Image.Image:
    """Random sequences with as many random frames of each as training might draw, in their order.

    Args:
        manifest: to draw from.
        sequences: how many to show; all of them if there are fewer.
        seed: of the draws.
        tile: side of a frame in pixels, of which the middle square is shown; a frame that cannot be read is red.
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
    """A line of text and below it the frames of one sequence."""
    first, end = manifest.starts[sequence : sequence + 2].tolist()
    views = min(int(rng.integers(VIEWS[0], VIEWS[1] + 1)), end - first)
    rows = first + np.sort(rng.choice(end - first, views, replace=False))
    pitch = tile + GAP
    strip = Image.new("RGB", (COLUMNS * pitch - GAP, LABEL + -(-views // COLUMNS) * pitch + GAP), "white")
    dataset = manifest.datasets[manifest.dataset_of[sequence]]
    text = f"{dataset}: {manifest.sequence_name(sequence)} ({views} of {end - first})"
    plain = text.encode("latin-1", "replace").decode("latin-1")  # what the built-in font can draw
    ImageDraw.Draw(strip).text((1, 1), plain, fill="black", font=ImageFont.load_default())
    for i, file in enumerate(manifest.files(rows)):
        strip.paste(_thumbnail(file, tile), (i % COLUMNS * pitch, LABEL + i // COLUMNS * pitch))
    return strip


def _thumbnail(file: Path, tile: int) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.draft("RGB", (2 * tile, 2 * tile))  # decodes large JPEGs at a fraction of their size
            return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (tile, tile))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return Image.new("RGB", (tile, tile), MISSING)

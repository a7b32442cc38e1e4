"""Pieces of the tasks' pictures: values as colours, images with names, pictures one below the other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, TEXT = 6, 13  # pixels: between images, of text


def colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values (...) as colours from blue to red, (..., 3) uint8."""
    from matplotlib import colormaps

    return colormaps["turbo"](np.clip((values - low) / max(high - low, 1e-12), 0, 1), bytes=True)[..., :3]


def tiles(named: Sequence[tuple[str, Any]], columns: int, side: int = 200) -> Image.Image:
    """Images (h, w, 3) uint8, arrays or tensors, as squares of `side` pixels with their names below, in rows."""
    step = side + 2 * TEXT
    page = Image.new("RGB", (columns * (side + GAP), -(-len(named) // columns) * step), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=TEXT)
    for i, (name, image) in enumerate(named):
        x, y = i % columns * (side + GAP), i // columns * step
        page.paste(Image.fromarray(np.asarray(image, np.uint8)).resize((side, side)), (x, y))
        draw.text((x + GAP, y + side), name, "black", font)
    return page


def stack(blocks: Sequence[Image.Image], title: str = "") -> Image.Image:
    """Pictures one below the other, under a title."""
    top = 2 * TEXT if title else 0
    size = max(block.width for block in blocks), top + sum(block.height for block in blocks)
    page = Image.new("RGB", size, "white")
    ImageDraw.Draw(page).text((GAP, 2), title, "black", ImageFont.load_default(size=TEXT))
    for block in blocks:
        page.paste(block, (0, top))
        top += block.height
    return page

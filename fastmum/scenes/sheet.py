"""A contact sheet: a row a scene, evenly spaced views along it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def contact_sheet(folders: list[Path], columns: int = 6, tile: int = 128) -> Image.Image:
    """RGB picture of len(folders) rows x columns tiles of `tile` pixels, two pixels apart."""
    pitch = tile + 2
    sheet = Image.new("RGB", (columns * pitch - 2, len(folders) * pitch - 2), "white")
    for row, folder in enumerate(folders):
        frames = json.loads((folder / "cameras.json").read_text())["frames"]
        for column, view in enumerate(np.linspace(0, len(frames) - 1, columns).round().astype(int)):
            with Image.open(folder / frames[view]["file"]) as image:
                sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), (column * pitch, row * pitch))
    return sheet

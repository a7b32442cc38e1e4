"""The data sets that `python -m fastmum.data.build` knows, in the order of the paper's list, then the general ones."""

from __future__ import annotations

from fastmum.data.builders import colmap, folder, megadepth, megascenes
from fastmum.data.builders.base import Builder

BUILDERS: dict[str, Builder] = {
    "megadepth": megadepth.BUILDER,
    "megascenes": megascenes.BUILDER,
    "folder": folder.BUILDER,
    "colmap": colmap.BUILDER,
}

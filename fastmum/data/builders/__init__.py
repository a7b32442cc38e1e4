"""The data sets that `python -m fastmum.data.build` knows."""

from __future__ import annotations

from fastmum.data.builders import folder, indoor, objects, scenes, sfm, video
from fastmum.data.builders.base import Builder

BUILDERS: dict[str, Builder] = {
    **sfm.BUILDERS,
    **objects.BUILDERS,
    **indoor.BUILDERS,
    **scenes.BUILDERS,
    "folder": folder.BUILDER,
    "video": video.BUILDER,
}

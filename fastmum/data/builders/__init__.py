"""The data sets that `python -m fastmum.data.build` knows."""

from fastmum.data.builders import benchmarks, indoor, lists, objects, released, rgbd, scenes, sfm, video
from fastmum.data.builders.base import Builder

BUILDERS: dict[str, Builder] = {}
for module in (sfm, objects, indoor, rgbd, scenes, video, released, benchmarks, lists):
    BUILDERS |= module.BUILDERS

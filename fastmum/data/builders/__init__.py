"""The data sets that `python -m fastmum.data.build` knows. A module is imported when one of its builders is used."""

import importlib
from collections.abc import Iterator, Mapping

from fastmum.data.builders.base import Builder

MODULES = {
    "sfm": ("megadepth", "megascenes", "colmap"),
    "objects": ("co3d", "wildrgbd"),
    "indoor": ("hypersim", "scannetpp", "arkitscenes"),
    "scenes": ("dl3dv", "streetview3d", "realestate10k", "blendedmvs", "imagenet", "scenes", "folder"),
    "video": ("video",),
}
MODULE_OF = {name: module for module, names in MODULES.items() for name in names}


class _Builders(Mapping[str, Builder]):
    def __getitem__(self, name: str) -> Builder:
        return importlib.import_module(f"{__name__}.{MODULE_OF[name]}").BUILDERS[name]

    def __iter__(self) -> Iterator[str]:
        return iter(MODULE_OF)

    def __len__(self) -> int:
        return len(MODULE_OF)


BUILDERS = _Builders()

"""The data sets that `python -m fastmum.data.build` knows, in the order of the paper's list, then the general ones."""

from __future__ import annotations

from fastmum.data.builders import (
    arkitscenes,
    blendedmvs,
    co3d,
    colmap,
    dl3dv,
    folder,
    hypersim,
    megadepth,
    megascenes,
    plain,
    realestate10k,
    scannetpp,
    scenes,
    video,
    wildrgbd,
)
from fastmum.data.builders.base import Builder

BUILDERS: dict[str, Builder] = {
    "megadepth": megadepth.BUILDER,
    "megascenes": megascenes.BUILDER,
    "co3d": co3d.BUILDER,
    "dl3dv": dl3dv.BUILDER,
    "hypersim": hypersim.BUILDER,
    "wildrgbd": wildrgbd.BUILDER,
    "streetview3d": plain.STREETVIEW3D,
    "realestate10k": realestate10k.BUILDER,
    "scannetpp": scannetpp.BUILDER,
    "blendedmvs": blendedmvs.BUILDER,
    "arkitscenes": arkitscenes.BUILDER,
    "imagenet": plain.IMAGENET,
    "folder": folder.BUILDER,
    "colmap": colmap.BUILDER,
    "video": video.BUILDER,
    "scenes": scenes.BUILDER,
}

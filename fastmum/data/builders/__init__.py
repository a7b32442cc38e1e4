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
    imagenet,
    megadepth,
    megascenes,
    realestate10k,
    scannetpp,
    streetview3d,
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
    "streetview3d": streetview3d.BUILDER,
    "realestate10k": realestate10k.BUILDER,
    "scannetpp": scannetpp.BUILDER,
    "blendedmvs": blendedmvs.BUILDER,
    "arkitscenes": arkitscenes.BUILDER,
    "imagenet": imagenet.BUILDER,
    "folder": folder.BUILDER,
    "colmap": colmap.BUILDER,
    "video": video.BUILDER,
}

"""Cameras, crops, warps, alignment and metrics, in one convention: docs/geometry.md."""

from fastmum.geometry.camera import Camera, relative_pose
from fastmum.geometry.crop import View, crop_resize

__all__ = ["Camera", "View", "crop_resize", "relative_pose"]

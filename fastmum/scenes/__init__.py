"""The embedded scenes: textured rooms and courtyards rendered on demand, each view with pose, intrinsics and depth.

Importing this package, or opening scenes that exist, imports no renderer.
"""

from fastmum.scenes.cache import ScenesError, ensure_scenes, scene_dirs

__all__ = ["ScenesError", "ensure_scenes", "scene_dirs"]

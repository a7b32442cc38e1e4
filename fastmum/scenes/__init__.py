"""The embedded scenes: textured rooms and courtyards rendered on the spot, with pose, intrinsics and depth a view.

Heavy imports (numpy, pillow, scikit-image's photographs) wait inside the functions: importing this costs nothing.
"""

from __future__ import annotations

from fastmum.scenes.cache import ensure_scenes, scene_dirs

__all__ = ["ensure_scenes", "scene_dirs"]

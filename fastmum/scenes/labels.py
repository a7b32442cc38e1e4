"""Labels of the rendered views for segmentation: files next to the scenes, written when they are first needed.

scene_0003/label/000.png has an index of `CLASSES` for each pixel centre, 0 for the sky.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from fastmum.errors import writing
from fastmum.files import read_json, write_atomic
from fastmum.scenes.cache import GENERATOR, ScenesError
from fastmum.scenes.layout import build_scene
from fastmum.scenes.raycast import SceneView, trace

CLASSES = (
    "sky", "floor", "wall", "ceiling", "door", "window", "lamp", "picture", "rug", "table", "stool", "shelf", "cabinet",
    "sofa", "crates", "barrels", "pedestal", "plant", "steps", "bench", "pillar", "building", "tree",
)  # fmt: skip


def ensure_labels(folder: Path) -> list[Path]:
    """Write the labels of a scene's views that are missing; returns all, in the order of the views.

    ScenesError: the folder has no scene of this version's generator, or cannot be written.
    """
    try:
        cameras = read_json(folder / "cameras.json")
        frames, (width, height) = cameras["frames"], cameras["size"]
        seed, index, generator = int(cameras["seed"]), int(cameras["name"].rpartition("_")[2]), cameras["generator"]
        files = [folder / "label" / frame["file"] for frame in frames]
        missing = [(frame, file) for frame, file in zip(frames, files, strict=True) if not file.is_file()]
        views = [(file, np.array(f["K"], float), np.array(f["T_cam_world"], float)) for f, file in missing]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ScenesError(f"'{folder}' is no rendered scene ({error}); delete it, or name another") from None
    if not missing:
        return files
    if generator != GENERATOR:
        raise ScenesError(f"'{folder}' is of generator {generator}, not {GENERATOR}: render it again for its labels")
    scene = build_scene(seed, index)
    label_of_solid = np.array([CLASSES.index(part.label) for part in scene.parts] + [0], np.uint8)  # -1 is the sky
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    with writing(folder / "label", ScenesError):
        (folder / "label").mkdir(exist_ok=True)
        for file, K_33, T_44 in views:
            view = SceneView(scene.solids, scene.open_top, K_33, T_44, width, height)
            _, solid_HW = trace(view, view.directions(x, y))
            content = io.BytesIO()
            Image.fromarray(label_of_solid[solid_HW]).save(content, "PNG")
            write_atomic(file, content.getvalue())
    return files

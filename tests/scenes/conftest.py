"""Small scenes rendered once for all tests of this folder."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from fastmum.scenes import ensure_scenes, scene_dirs


class Frame(NamedTuple):
    """A stored view: image [H, W, 3] float64, depth [H, W] in metres (0: unknown), K [3, 3], T [4, 4]."""

    image: np.ndarray
    depth: np.ndarray
    K: np.ndarray
    T: np.ndarray


def read_scene(folder) -> tuple[dict, list[Frame]]:
    cameras = json.loads((folder / "cameras.json").read_text())
    frames = []
    for entry in cameras["frames"]:
        image = np.asarray(Image.open(folder / entry["file"]), dtype=np.float64)
        depth = np.asarray(Image.open(folder / entry["depth"])).astype(np.float64) * cameras["depth_unit"]
        frames.append(Frame(image, depth, np.array(entry["K"]), np.array(entry["T_cam_world"])))
    return cameras, frames


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> list[tuple[dict, list[Frame]]]:
    """Four scenes of 4 views at 96 pixels, seed 0; scene 3 is a courtyard."""
    root = ensure_scenes(4, 4, 96, 0, cache_dir=tmp_path_factory.mktemp("cache"), workers=2, progress=False)
    return [read_scene(folder) for folder in scene_dirs(root, 4)]

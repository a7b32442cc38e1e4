"""Small scenes rendered once for all tests of this folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmum.scenes import ensure_scenes, scene_dirs

COUNT, VIEWS, SIZE = 3, 4, 96


@dataclass(frozen=True)
class Frame:
    """One stored view: image [H, W, 3] float64, depth [H, W] in metres (0: unknown), K [3, 3], T [4, 4]."""

    image: np.ndarray
    depth: np.ndarray
    K: np.ndarray
    T: np.ndarray


def read_scene(folder: Path) -> tuple[dict, list[Frame]]:
    cameras = json.loads((folder / "cameras.json").read_text())
    frames = []
    for entry in cameras["frames"]:
        image = np.asarray(Image.open(folder / entry["file"]), dtype=np.float64)
        depth = np.asarray(Image.open(folder / entry["depth"])).astype(np.float64) * cameras["depth_unit"]
        frames.append(Frame(image, depth, np.array(entry["K"]), np.array(entry["T_cam_world"])))
    return cameras, frames


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of COUNT scenes of VIEWS views at SIZE pixels, seed 0 (scene 3, the first courtyard, is among four)."""
    base = tmp_path_factory.mktemp("cache")
    return ensure_scenes(COUNT + 1, VIEWS, SIZE, 0, cache_dir=base, workers=2, progress=False)


@pytest.fixture(scope="session")
def scenes(rendered: Path) -> list[tuple[dict, list[Frame]]]:
    return [read_scene(folder) for folder in scene_dirs(rendered, COUNT + 1)]

"""One scene on disk: rendering it into a folder, and telling whether a folder is whole.

Layout: scene_0003/000.png ... (RGB), scene_0003/depth/000.png (16-bit z-depth in `depth_unit` metres, 0 = sky) and
scene_0003/cameras.json: size, pixel_centre, depth_unit and, for each frame, file, depth, K (3 x 3) and T_cam_world
(4 x 4, world to camera; camera axes x right, y down, z forward).
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastmum.scenes.atlas import bake
from fastmum.scenes.layout import build_scene
from fastmum.scenes.raycast import View, render

GENERATOR = 1  # rises whenever the same seed gives other bytes
STALE_SECONDS = 3600  # a temporary folder this old belongs to a process that died


@dataclass(frozen=True)
class Settings:
    """What decides a scene's bytes, besides its number."""

    seed: int
    views: int
    size: int


def scene_name(index: int) -> str:
    """Folder name of a scene."""
    return f"scene_{index:04d}"


def is_complete(folder: Path, settings: Settings) -> bool:
    """Whether every file of a scene is there.

    Raises:
        FileExistsError: the folder holds a whole scene made with other settings.
    """
    try:
        cameras = json.loads((folder / "cameras.json").read_text())
        files = [folder / frame[key] for frame in cameras["frames"] for key in ("file", "depth")]
        found = (cameras["generator"], cameras["seed"], len(cameras["frames"]), *cameras["size"])
        if any(path.stat().st_size == 0 for path in files):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if found != (GENERATOR, settings.seed, settings.views, settings.size, settings.size):
        raise FileExistsError(f"{folder} is a scene made with other settings; choose another folder or delete it")
    return True


def write_scene(root: Path, index: int, settings: Settings, on_view: Callable[[], None] = lambda: None) -> Path:
    """Renders one scene into a temporary sibling and moves it into place when it is whole.

    Args:
        root: folder of the scenes; it must exist.
        index: number of the scene.
        settings: seed, views and size.
        on_view: called after every view.

    Returns:
        The scene's folder.

    Raises:
        OSError: the folder cannot be written.
    """
    final = root / scene_name(index)
    part = _sibling(final)
    try:
        _render_into(part, index, settings, on_view)
        _put(part, final, settings)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


def _sibling(final: Path) -> Path:
    """A new empty folder beside `final` (with the usual rights, unlike tempfile's: a cache may be shared)."""
    part = final.with_name(f".{final.name}-{os.getpid()}-{secrets.token_hex(4)}.part")
    part.mkdir()
    return part


def _put(part: Path, final: Path, settings: Settings) -> None:
    """Moves a whole scene into place; if another process was faster, its equal copy stays."""
    for _ in range(3):
        try:
            os.replace(part, final)
            return
        except OSError:
            if not final.exists():
                raise
        if is_complete(final, settings):
            return
        aside = _sibling(final)
        try:
            os.replace(final, aside / "old")
        except FileNotFoundError:
            pass  # another process moved it away first
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    raise OSError(f"{final} is in the way and cannot be replaced")


def remove_leftovers(root: Path) -> None:
    """Deletes temporary folders of processes that were killed more than an hour ago."""
    for part in root.glob(".scene_*.part"):
        try:
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(part, ignore_errors=True)
        except FileNotFoundError:
            continue


def _render_into(folder: Path, index: int, settings: Settings, on_view: Callable[[], None]) -> None:
    scene = build_scene(settings.seed, index)
    K_33 = scene.path.intrinsics(settings.size)
    eyes_V3, _ = scene.path.eyes(np.linspace(0, 1, 49))
    atlas = bake(scene, eyes_V3, 1 / K_33[0, 0], (settings.seed, index, 2))
    unit = round(math.ceil(scene.reach / 65535 / 1e-5) * 1e-5, 5)
    (folder / "depth").mkdir()
    frames = []
    for view, T_44 in enumerate(scene.path.poses(settings.views)):
        name = f"{view:03d}.png"
        camera = View(scene.solids, scene.open_top, K_33, T_44, settings.size, settings.size)
        image_HW3, depth_HW = render(camera, atlas)
        Image.fromarray(image_HW3).save(folder / name, compress_level=1)
        counts = np.rint(depth_HW.astype(np.float64) / unit).astype(np.uint16)
        Image.fromarray(counts).save(folder / "depth" / name, compress_level=1)
        frames.append({"file": name, "depth": f"depth/{name}", "K": K_33.tolist(), "T_cam_world": T_44.tolist()})
        on_view()
    cameras = {
        "name": scene_name(index),
        "kind": scene.kind,
        "seed": settings.seed,
        "generator": GENERATOR,
        "size": [settings.size, settings.size],
        "pixel_centre": 0.5,
        "depth_unit": unit,
        "frames": frames,
    }
    (folder / "cameras.json").write_text(json.dumps(cameras, indent=1) + "\n")

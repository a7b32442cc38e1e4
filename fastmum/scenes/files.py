"""One scene on disk, and the worker program that renders scenes (`python -m fastmum.scenes.files`).

Layout: scene_0003/000.png ... (RGB), scene_0003/depth/000.png (16-bit z-depth in `depth_unit` metres, 0 = sky) and
scene_0003/cameras.json: size, pixel_centre, depth_unit and, for each frame, file, depth, K (3 x 3) and T_cam_world
(4 x 4, world to camera; camera axes x right, y down, z forward).
"""

import contextlib
import json
import math
import os
import random
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from fastmum.scenes.atlas import bake
from fastmum.scenes.cache import GENERATOR, ScenesError, Settings, is_complete, scene_folder
from fastmum.scenes.layout import build_scene
from fastmum.scenes.raycast import SceneView, render

STALE_SECONDS = 3600  # age after which a temporary folder is taken for one of a dead process


def write_scenes(root: Path, indices: Sequence[int], settings: Settings, on_view: Callable[[], object]) -> None:
    """Render those scenes that do not exist yet, in random order; `on_view` is called for every view of all of them.

    So programs that need the same scenes at the same time share the work. Errors: those of `write_scene`.
    """
    for index in random.SystemRandom().sample(indices, len(indices)):
        if is_complete(scene_folder(root, index), settings):
            for _ in range(settings.views):
                on_view()
        else:
            write_scene(root, index, settings, on_view)


def write_scene(root: Path, index: int, settings: Settings, on_view: Callable[[], object] = lambda: None) -> None:
    """Render a scene into a temporary folder in `root`, which must exist, and rename it when it is complete.

    If another process was faster, its identical copy is kept. `on_view` is called after every view. OSError if the
    folder cannot be written.
    """
    final = scene_folder(root, index)
    # Unlike tempfile's, the folder has the usual access rights, because a cache may be shared.
    part = root / f".{final.name}-{secrets.token_hex(6)}.part"
    part.mkdir()
    try:
        _render_into(part, final.name, index, settings, on_view)
        if not is_complete(final, settings):
            shutil.rmtree(final, ignore_errors=True)
        try:
            os.replace(part, final)
        except OSError:
            if not is_complete(final, settings):
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Delete temporary folders of processes that were killed more than an hour ago."""
    for part in root.glob(".scene_*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(part, ignore_errors=True)


def _render_into(folder: Path, name: str, index: int, settings: Settings, on_view: Callable[[], object]) -> None:
    scene, size = build_scene(settings.seed, index), settings.size
    K_33 = scene.path.intrinsics(size)
    eyes_V3, _ = scene.path.eyes(np.linspace(0, 1, 49))
    atlas = bake(scene, eyes_V3, 1 / K_33[0, 0], (settings.seed, index, 2))
    unit = round(math.ceil(scene.reach / 65535 / 1e-5) * 1e-5, 5)
    (folder / "depth").mkdir()
    frames = []
    for view, T_44 in enumerate(scene.path.poses(settings.views)):
        file = f"{view:03d}.png"
        image_HW3, depth_HW = render(SceneView(scene.solids, scene.open_top, K_33, T_44, size, size), atlas)
        Image.fromarray(image_HW3).save(folder / file, compress_level=1)
        counts = np.rint(depth_HW.astype(np.float64) / unit).astype(np.uint16)
        Image.fromarray(counts).save(folder / "depth" / file, compress_level=1)
        frames.append({"file": file, "depth": f"depth/{file}", "K": K_33.tolist(), "T_cam_world": T_44.tolist()})
        on_view()
    cameras = {
        "name": name, "kind": scene.kind, "seed": settings.seed, "generator": GENERATOR,
        "size": [size, size], "pixel_centre": 0.5, "depth_unit": unit, "frames": frames,
    }  # fmt: skip
    (folder / "cameras.json").write_text(json.dumps(cameras, indent=1) + "\n")


def main() -> int:
    """Render the scenes of a job, JSON in argv. Print "view" after each view, "error" and a message after a failure."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` deletes the temporary folder
    job = json.loads(sys.argv[1])
    send = partial(print, end="", flush=True)  # a line in one piece, since processes share the pipe
    try:
        write_scenes(Path(job["root"]), job["indices"], Settings(**job["settings"]), lambda: send("view\n"))
    except (KeyboardInterrupt, BrokenPipeError):
        return 130  # the parent has ended or is ending, and reports it
    except (OSError, ScenesError) as error:
        send(f"error {json.dumps(getattr(error, 'strerror', None) or str(error))}\n")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # no exception while the interpreter shuts down
    return 0


if __name__ == "__main__":
    sys.exit(main())

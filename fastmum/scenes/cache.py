"""The cache of rendered scenes: which scenes exist, and rendering the missing ones in several processes.

Only rendering imports NumPy, Pillow and the renderer.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastmum.errors import FastmumError
from fastmum.files import cache_folder, expand_user, read_json

GENERATOR = 1  # increased whenever the same seed gives other bytes


class ScenesError(FastmumError):
    """Scenes that cannot be rendered or found."""


class Settings(NamedTuple):
    """With the index of a scene, these determine its bytes."""

    seed: int
    views: int
    size: int


def ensure_scenes(
    count: int = 20, views: int = 24, size: int = 256, seed: int = 0, cache_dir: Path | None = None,
    workers: int | None = None, progress: bool = True,
) -> Path:  # fmt: skip
    """Render the embedded scenes that the cache lacks and return their folder.

    Scene i has the same bytes for all values of `count` and `workers`. The folder may hold more than `count` scenes
    (see `scene_dirs`). ScenesError: an argument is out of range, the folder cannot be written, photographs are missing,
    or a rendering process died.

    Args:
        views, size: views per scene, and their side in pixels, at least 16.
        seed: chooses rooms and camera paths; not negative.
        cache_dir: default: $FASTMUM_CACHE, else the user's cache folder.
        workers: processes; 0 or 1 renders in this process; None: one per core, at most 8.
    """
    settings = Settings(seed, views, size)
    root = cached_folder(settings, cache_dir)
    render_missing(root, count, settings, workers, progress)
    return root


def cached_folder(settings: Settings, cache_dir: Path | None = None) -> Path:
    """Folder of the scenes of these settings; see `cache_dir` of `ensure_scenes`."""
    base = expand_user(cache_dir) if cache_dir else cache_folder()
    return base / f"scenes-v{GENERATOR}-seed{settings.seed}-{settings.views}x{settings.size}"


def scene_folder(root: Path, index: int) -> Path:
    """Folder of scene `index` in `root`."""
    return Path(root) / f"scene_{index:04d}"


def scene_dirs(root: Path, count: int) -> list[Path]:
    """The first `count` scene folders in `root`; ScenesError if one is missing."""
    folders = [scene_folder(root, index) for index in range(count)]
    for folder in folders:
        if not (folder / "cameras.json").is_file():
            raise ScenesError(f"{folder} is missing: call ensure_scenes(count={count}, ...) first")
    return folders


def is_complete(folder: Path, settings: Settings) -> bool:
    """Whether all files of a scene exist; ScenesError if they do and have other settings."""
    try:
        cameras = read_json(folder / "cameras.json")
        files = [folder / frame[key] for frame in cameras["frames"] for key in ("file", "depth")]
        found = (cameras["generator"], cameras["seed"], len(cameras["frames"]), *cameras["size"])
        if any(path.stat().st_size == 0 for path in files):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if found != (GENERATOR, *settings, settings.size):
        raise ScenesError(f"{folder} is a scene made with other settings; choose another folder or delete it")
    return True


def render_missing(root: Path, count: int, settings: Settings, workers: int | None = None, show: bool = True) -> int:
    """Render those of the first `count` scenes that `root` lacks and return their number; see `ensure_scenes`."""
    limits = {"count": 1, "views": 1, "size": 16, "seed": 0, "workers": 0}
    for name, value in {"count": count, "workers": workers or 0, **settings._asdict()}.items():
        if value < limits[name]:
            raise ScenesError(f"{name} must be at least {limits[name]}, got {value}")
    missing = [index for index in range(count) if not is_complete(scene_folder(root, index), settings)]
    if not missing:
        return 0
    from fastmum.progress import progress_bar
    from fastmum.scenes.files import remove_leftovers, write_scenes
    from fastmum.scenes.textures import photo_folder

    photo_folder()  # fail early if the photographs are missing
    processes = min(workers if workers is not None else min(os.cpu_count() or 1, 8), len(missing))
    total = len(missing) * settings.views
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        with progress_bar(total=total, unit="view", desc="rendering scenes", show=show) as bar:
            if processes > 1:
                _render_in_processes(root, missing, settings, processes, bar.update)
            else:
                write_scenes(root, missing, settings, bar.update)
    except OSError as error:
        failed = f"cannot write scenes to {root} ({error.strerror or error})"
        raise ScenesError(f"{failed}: free space, or choose another folder with FASTMUM_CACHE") from error
    return len(missing)


def _render_in_processes(
    root: Path, missing: list[int], settings: Settings, processes: int, on_view: Callable[[], object]
) -> None:
    """Render in worker programs (see `files.main`), which unlike multiprocessing do not import the caller's script."""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    paths = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    reader, writer = os.pipe()
    workers = []
    for shard in (missing[i::processes] for i in range(processes)):
        job = json.dumps({"root": str(root.resolve()), "indices": shard, "settings": settings._asdict()})
        command = [sys.executable, "-m", "fastmum.scenes.files", job]
        workers.append(subprocess.Popen(command, env=environment, stdout=writer))
    os.close(writer)
    try:
        with open(reader) as lines:  # ends when all workers have ended
            for line in lines:
                if line.startswith("error "):
                    raise OSError(json.loads(line.removeprefix("error ")))
                on_view()
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    finally:
        codes = [worker.wait() for worker in workers]
    if any(codes):
        raise ScenesError(f"a rendering process ended early (exit code {next(filter(None, codes))})")

"""The cache of rendered scenes: which are there, and rendering the rest over several processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmum.scenes.files import Settings


def ensure_scenes(
    count: int = 20,
    views: int = 24,
    size: int = 256,
    seed: int = 0,
    cache_dir: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """The folder of the embedded scenes, rendered where they are missing.

    Scene i is the same, byte for byte, whatever `count` and `workers` are.

    Args:
        count: scenes wanted; the folder may hold more (see `scene_dirs`).
        views: views a scene.
        size: side of a picture in pixels, at least 16.
        seed: chooses all rooms and paths; not negative.
        cache_dir: where scenes are kept; None is $FASTMUM_CACHE or else the user's cache folder.
        workers: processes; 0 or 1 renders in this one; None is one a core, at most 8.
        progress: whether to show a bar.

    Returns:
        A folder that holds scene_0000, scene_0001, ...; its name carries generator version, seed, views and size.

    Raises:
        ValueError: an argument is out of range.
        OSError: the folder cannot be written, or scikit-image's photographs are missing.
        RuntimeError: a rendering process died.
    """
    root = cached_folder(views, size, seed, cache_dir)
    render_missing(root, count, views, size, seed, workers, progress)
    return root


def cached_folder(views: int, size: int, seed: int, cache_dir: Path | None = None) -> Path:
    """Where scenes of these settings are kept: under cache_dir, or else $FASTMUM_CACHE or the user's cache folder."""
    from platformdirs import user_cache_dir

    from fastmum.scenes.files import GENERATOR

    base = Path(cache_dir or os.environ.get("FASTMUM_CACHE") or user_cache_dir("fastmum"))
    return base / f"scenes-v{GENERATOR}-seed{seed}-{views}x{size}"


def scene_dirs(root: Path, count: int) -> list[Path]:
    """The first `count` scene folders of a folder that `ensure_scenes` gave; FileNotFoundError if one is missing."""
    from fastmum.scenes.files import scene_name

    folders = [Path(root) / scene_name(index) for index in range(count)]
    for folder in folders:
        if not (folder / "cameras.json").is_file():
            raise FileNotFoundError(f"{folder} is missing: call ensure_scenes(count={count}, ...) first")
    return folders


def render_missing(
    root: Path, count: int, views: int, size: int, seed: int, workers: int | None = None, progress: bool = True
) -> int:
    """Renders those of the first `count` scenes that `root` lacks; arguments and errors as in `ensure_scenes`.

    Returns:
        How many scenes were rendered.
    """
    from fastmum.scenes.files import Settings, is_complete, remove_leftovers, scene_name
    from fastmum.scenes.photos import photo_folder

    limits = {
        "count": (count, 1),
        "views": (views, 1),
        "size": (size, 16),
        "seed": (seed, 0),
        "workers": (workers or 0, 0),
    }
    for name, (value, least) in limits.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    settings = Settings(seed, views, size)
    missing = [index for index in range(count) if not is_complete(root / scene_name(index), settings)]
    if not missing:
        return 0
    photo_folder()  # says so at once if the photographs are missing
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"cannot create {root} ({error.strerror}): choose a folder you may write to") from error
    remove_leftovers(root)
    from tqdm import tqdm

    processes = min(workers if workers is not None else min(os.cpu_count() or 1, 8), len(missing))
    with tqdm(total=len(missing) * views, unit="view", desc="rendering scenes", disable=not progress) as bar:
        try:
            if processes <= 1:
                _render_here(root, missing, settings, bar.update)
            else:
                _render_apart(root, missing, settings, processes, bar.update)
        except OSError as error:
            reason = error.strerror or error
            raise type(error)(
                f"cannot write scenes to {root} ({reason}): free space or choose another folder"
            ) from error
    return len(missing)


def _render_here(root: Path, missing: list[int], settings: Settings, on_view: Callable[[], object]) -> None:
    from fastmum.scenes.files import write_scene

    for index in missing:
        write_scene(root, index, settings, on_view)


def _render_apart(
    root: Path, missing: list[int], settings: Settings, processes: int, on_view: Callable[[], object]
) -> None:
    """One thread a worker hands out scenes and counts views; the first error stops them all."""
    queue, lock, failures = list(missing), threading.Lock(), []
    package = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-m", "fastmum.scenes.worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen(command, env=os.environ | one_thread | {"PYTHONPATH": path}, **pipes) for _ in range(processes)
    ]

    def count_view() -> None:
        with lock:
            on_view()

    def serve(worker: subprocess.Popen) -> None:
        try:
            while True:
                with lock:
                    if not queue:
                        break
                    index = queue.pop(0)
                _one_job(worker, {"root": str(root.resolve()), "index": index} | vars(settings), count_view)
            worker.stdin.close()
            worker.wait()
        except Exception as error:
            failures.append(error)
            for each in running:  # the others' scenes in progress would be for nothing
                each.terminate()

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in running]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for worker in running:
            worker.terminate()  # nothing to one that has ended
        for thread in threads:
            thread.join()
        for worker in running:
            worker.wait()
            worker.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
    if failures:
        raise failures[0]


def _one_job(worker: subprocess.Popen, job: dict, on_view: Callable[[], object]) -> None:
    try:
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.flush()
        for line in worker.stdout:
            word, _, rest = line.strip().partition(" ")
            if word == "view":
                on_view()
            elif word == "done":
                return
            elif word == "error":
                name, message = json.loads(rest)
                raise {"PermissionError": PermissionError, "FileNotFoundError": FileNotFoundError}.get(name, OSError)(
                    message
                )
    except BrokenPipeError:
        pass  # it ended before it read the job; its exit code is reported below
    raise RuntimeError(f"the process rendering scene {job['index']} ended early (exit code {worker.wait()})")

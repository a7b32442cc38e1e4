"""Checkpoints in a folder: which there are, which go, which are set aside. Names and times of files mean nothing."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import NamedTuple

from fastmum.engine.checkpoint.about import MANIFEST, About
from fastmum.engine.checkpoint.errors import UnreadableError

log = logging.getLogger(__name__)

PARTIAL, ABANDONED = ".partial", ".abandoned"


class Found(NamedTuple):
    """A checkpoint; what it says about itself, or why that cannot be read."""

    path: Path
    about: About | None
    problem: str = ""


def find_checkpoints(path: Path) -> list[Found]:
    """The checkpoint that `path` is, or those in the run or folder that it is, newest first.

    Newest is the one of most steps, by its content. Those that cannot say their step come before all.
    """
    if (path / MANIFEST).exists():
        return [_found(path)]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    children = folder.iterdir() if folder.is_dir() else ()
    found = [_found(child) for child in children if _is_checkpoint(child)]
    return sorted(found, key=lambda f: (f.about is None, f.about.step if f.about else 0, f.path.name), reverse=True)


def _is_checkpoint(path: Path) -> bool:
    # Without its manifest, the files of torch.distributed.checkpoint still tell that there has been one.
    there = any((path / name).exists() for name in (MANIFEST, ".metadata"))
    return there and not any(mark in path.name for mark in (PARTIAL, ABANDONED))


def _found(path: Path) -> Found:
    try:
        return Found(path, About.read(path))
    except UnreadableError as error:
        return Found(path, None, str(error))


def set_aside_after(folder: Path, step: int) -> None:
    """Rename checkpoints of more steps than a run resumes from: they belong to another branch of it, or are damaged.

    To be called by one rank, before there are `Checkpoints` in the folder.
    """
    for found in find_checkpoints(folder):
        if found.about is None or found.about.step > step:
            found.path.rename(_free(found.path.with_name(found.path.name + ABANDONED)))
            why = "lies after the step that the run goes on from" if found.about else "cannot be read"
            log.info("'%s' %s and was renamed", found.path, why)


def free_name(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step can be put."""
    return _free(folder / f"step_{step:07d}")


def _free(path: Path) -> Path:
    name, number = path.name, 2
    while path.exists():
        path = path.with_name(f"{name}-{number}")
        number += 1
    return path


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep`, those every `keep_every` steps, and of those of one step all but the last.

    Raises:
        OSError: one cannot be deleted.
    """
    seen: list[int] = []
    for found in find_checkpoints(folder):
        if found.about is None:
            continue  # perhaps a fault that passes; resuming sets it aside
        step = found.about.step
        wanted = len(seen) < keep or (keep_every and step % keep_every == 0)
        if step in seen or not wanted:
            remove(found.path)
        if step not in seen:
            seen.append(step)


def remove(path: Path) -> None:
    """Delete a checkpoint; half of one is never taken for a whole.

    Raises:
        OSError: it cannot be deleted.
    """
    shutil.rmtree(path.rename(_free(path.with_name(path.name + PARTIAL))))


def remove_partial(folder: Path) -> None:
    """Delete what a crash left behind."""
    for path in folder.glob(f"*{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)

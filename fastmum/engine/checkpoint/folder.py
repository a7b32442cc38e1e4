"""The checkpoints in a folder, ordered by their manifests: file names and times have no meaning."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import NamedTuple

from fastmum.engine.checkpoint.manifest import MANIFEST, CheckpointManifest, UnreadableError

log = logging.getLogger(__name__)

PARTIAL, ABANDONED = ".partial", ".abandoned"


class FoundCheckpoint(NamedTuple):
    """A checkpoint and its manifest, or why the manifest cannot be read."""

    path: Path
    manifest: CheckpointManifest | None
    problem: str = ""


def find_checkpoints(path: Path) -> list[FoundCheckpoint]:
    """The checkpoints in a folder or run, most steps first; or the checkpoint that `path` is.

    Those without a readable manifest come first: they may be newer.
    """
    if (path / MANIFEST).exists():
        return [_found(path)]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [_found(child) for child in (folder.iterdir() if folder.is_dir() else ()) if _is_checkpoint(child)]
    return sorted(
        found, key=lambda f: (f.manifest is None, f.manifest.step if f.manifest else 0, f.path.name), reverse=True
    )


def _is_checkpoint(path: Path) -> bool:
    # .metadata of torch.distributed.checkpoint: a checkpoint that lost its manifest is reported as damaged.
    exists = any((path / name).exists() for name in (MANIFEST, ".metadata"))
    return exists and PARTIAL not in path.name and ABANDONED not in path.name


def _found(path: Path) -> FoundCheckpoint:
    try:
        return FoundCheckpoint(path, CheckpointManifest.read(path))
    except UnreadableError as error:
        return FoundCheckpoint(path, None, str(error))


def set_aside_after(folder: Path, step: int) -> None:
    """Rename damaged checkpoints and those after the step that a run resumes from: they belong to another branch.

    Called by one rank, before `Checkpoints` of the folder exist.
    """
    for found in find_checkpoints(folder):
        if found.manifest is None or found.manifest.step > step:
            found.path.rename(_free(found.path.with_name(found.path.name + ABANDONED)))
            why = f"is after step {step}, from which the run resumes" if found.manifest else "cannot be read"
            log.info("'%s' %s and was renamed", found.path, why)


def publish(partial: Path, step: int) -> Path:
    """Rename a complete partial folder to the next free name of its step."""
    return partial.rename(_free(partial.with_name(f"step_{step:07d}")))


def _free(path: Path) -> Path:
    name, number = path.name, 2
    while path.exists():
        path = path.with_name(f"{name}-{number}")
        number += 1
    return path


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep` and the multiples of `keep_every`; of equal steps, all but the last written."""
    seen: set[int] = set()
    for found in find_checkpoints(folder):
        if found.manifest is None:
            continue  # perhaps a transient error; set aside on resume
        step = found.manifest.step
        if step in seen or not (len(seen) < keep or (keep_every and step % keep_every == 0)):
            # Renamed first: an interrupted deletion leaves no checkpoint that looks whole.
            shutil.rmtree(found.path.rename(_free(found.path.with_name(found.path.name + PARTIAL))))
        seen.add(step)


def remove_partial(folder: Path) -> None:
    """Delete the leftovers of a crash."""
    for path in folder.glob(f"*{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)

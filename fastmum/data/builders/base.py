"""The interface of a builder, and what builders share: options, listing of files, cutting scenes into sequences.

A data set is read in independent parts (scenes, categories ...), in any order and by any number of processes. The
manifest holds their sequences in the order of `Builder.parts`, so it does not depend on the number of workers.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import natsort
import numpy as np

from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord
from fastmum.data.rules import CHUNK, cut_into_chunks

log = logging.getLogger(__name__)

Cameras = tuple[np.ndarray | None, np.ndarray | None]  # poses and intrinsics of the frames, as in `SequenceRecord`

RULES = ("paper", "released")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
# Folders next to a scene's photographs that hold something else.
OTHER_FOLDERS = frozenset({"depth", "depths", "mask", "masks", "normal", "normals"})


class Option(NamedTuple):
    """An option of a builder, `--min-frames` for the name `min_frames`."""

    default: Any  # None where the default depends on the rule
    help: str  # one line for `--help`
    type: Callable[[str], Any] | None = None  # of the value; None is the type of the default
    min: float | None = None
    max: float | None = None
    choices: tuple[Any, ...] = ()  # allowed values, empty for any


class Options(SimpleNamespace):
    """`rule`, `seed`, `out` (path of the manifest) and the builder's options, by name."""

    rule: str
    seed: int
    out: Path

    def rng(self, part: str) -> np.random.Generator:
        """Random generator of one part, a function of the seed and the part's name only."""
        digest = hashlib.sha256(part.encode(errors="surrogateescape")).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little")])


@dataclass(frozen=True)
class Builder:
    """A data set that `python -m fastmum.data.build` knows."""

    layout: str  # files below --root, in one line
    paper: str  # the paper's rule, in a few words
    parts: Callable[[Path, Options], Sequence[str]]  # their names, in order; empty if the layout is another one
    sequences: Callable[[Path, str, Options], Iterable[SequenceRecord]]  # of a part; must be picklable, and the results
    released: str | None = None  # the rule of the authors' released script, None if it is the same
    options: Mapping[str, Option] = field(default_factory=dict)
    begin: Callable[[Path, Options], None] | None = None  # called before anything is read; checks packages, folders ...
    root: Callable[[Path, Options], Path] | None = None  # folder that the frames' paths are relative to, None: --root


MIN_FRAMES = {"min_frames": Option(2, "skip shorter sequences", min=1)}
POSES = {"poses": Option(True, "read poses and intrinsics if present")}
DEPTH = {"depth": Option(True, "list depth maps and masks if present")}
CHUNK_OPTION = Option(None, "frames per chunk, 0: the whole scene (default: the rule's)", type=int, min=0)
CHUNKED = MIN_FRAMES | {"chunk": CHUNK_OPTION}
CHUNK_RULE = f"natural order, chunks of {CHUNK}, the last one shorter"


def make_scene(
    root: Path, name: str, frames: list[str], options: Options, cameras: Callable[[], Cameras] | None = None,
    depths: Iterable[str] = (), depth_format: DepthFormat | None = None, masks: Iterable[str] = (),
) -> SequenceRecord:  # fmt: skip
    """A scene with what the options ask for.

    `cameras` returns poses and intrinsics of the frames; `depths` and `masks` are paths of maps, which may not exist.
    """
    poses, intrinsics = cameras() if cameras and frames and options.poses else (None, None)
    scene = SequenceRecord(name, frames, poses, intrinsics)
    if depths and options.depth:
        scene = scene._replace(depths=existing(root, depths), depth_format=depth_format)
    return scene._replace(masks=existing(root, masks)) if masks and options.depth else scene


def whole(scene: SequenceRecord, options: Options) -> Iterator[SequenceRecord]:
    """The scene if it has at least `options.min_frames` frames."""
    if len(scene.frames) >= options.min_frames:
        yield scene


def chunks(scene: SequenceRecord, options: Options, released: int | None) -> Iterator[SequenceRecord]:
    """The scene in chunks, `<name>/000`, `<name>/001`, ... `released`: frames per chunk in the released script."""
    size = options.chunk if options.chunk is not None else CHUNK if options.rule == "paper" else released
    if not size:
        yield from whole(scene, options)
        return
    for i, rows in enumerate(cut_into_chunks(len(scene.frames), size, last_takes_rest=options.rule == "released")):
        yield from whole(scene.select(rows, f"{scene.name}/{i:03d}"), options)


def is_image(name: str) -> bool:
    """Whether a file name is an image's; hidden files (macOS writes some) are not."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def images_in(folder: Path) -> list[str]:
    """Names of the images in a folder in natural order (2 before 10); empty if there is no such folder."""
    return natsort.natsorted(name for name in names_in(folder) if is_image(name))


def walk(root: Path, skip: frozenset[str] = frozenset()) -> Iterator[tuple[str, list[str]]]:
    """Visible folders at or below the root, '.' for the root itself, and the names of their files.

    Folders named as in `skip`, in lower case, are left out, which is logged.
    """
    skipped = 0
    for folder, subfolders, files in os.walk(root, followlinks=True):
        kept = [name for name in subfolders if name.lower() not in skip]
        skipped += len(subfolders) - len(kept)
        subfolders[:] = natsort.natsorted(name for name in kept if not name.startswith("."))
        yield Path(folder).relative_to(root).as_posix(), files
    if skipped:
        log.info("skipped %d folders of depth, masks or normals under %s", skipped, root)


def image_folders(root: Path) -> list[str]:
    """Every visible folder at or below the root that contains images, without those of depth, masks and normals."""
    return [folder for folder, files in walk(root, OTHER_FOLDERS) if any(map(is_image, files))]


def folders_in(folder: Path) -> list[str]:
    """Names of the visible sub-folders in natural order; empty if there is no such folder."""
    names = (name for name in names_in(folder) if not name.startswith("."))
    return natsort.natsorted(name for name in names if os.path.isdir(os.path.join(folder, name)))


def matching_folders(root: Path, pattern: str, needs: str = "") -> list[str]:
    """Folders such as "*/scenes/*" below the root that contain the path `needs`, in natural order."""
    found = [""]
    for level in pattern.split("/"):
        found = [f"{f}/{n}" for f in found for n in (folders_in(root / f[1:]) if level == "*" else [level])]
    return [folder[1:] for folder in found if (root / folder[1:] / needs).exists()]


def existing(root: Path, paths: Iterable[str]) -> list[str] | None:
    """Paths below `root` with "" for those that do not exist, None if none does. Every folder is listed once."""
    listed: dict[str, frozenset[str]] = {}
    found = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in listed:
            listed[folder] = frozenset(names_in(root / folder))
        found.append(path if name in listed[folder] else "")
    return found if any(found) else None


def names_in(folder: Path) -> list[str]:
    """Names of all files and sub-folders; empty if there is no such folder."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"the folder '{folder}' cannot be read ({error.strerror})") from None

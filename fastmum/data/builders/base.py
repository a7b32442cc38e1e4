"""The interface of a builder, and what builders share: options, listing of files, cutting scenes into sequences.

A data set is read in independent parts (scenes, categories ...), in any order and by any number of processes. The
manifest holds their sequences in the order of `Builder.parts`, so it does not depend on the number of workers.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import natsort
import numpy as np

from fastmum.data.archives import TreePath
from fastmum.data.decode.image import IMAGE_SUFFIXES, is_image
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord
from fastmum.data.rules import CHUNK, cut_into_chunks
from fastmum.errors import some_names

log = logging.getLogger(__name__)

Cameras = tuple[np.ndarray | None, np.ndarray | None]  # poses and intrinsics of the frames, as in `SequenceRecord`

RULES = ("paper", "released")
OTHER_IMAGE_SUFFIXES = frozenset(
    """.heic .heif .hif .jxl .exr .hdr .dng .cr2 .cr3 .nef .arw .orf .raf .rw2 .psd .dds .dib .ico .icns .pcx .dcx .sgi
    .rgb .rgba .bw .ras .xbm .xpm .svg .eps""".split()  # noqa: SIM905
)
# Folders next to a scene's photographs that hold something else.
OTHER_FOLDERS = frozenset({"depth", "depths", "label", "labels", "mask", "masks", "normal", "normals"})
# Folders that network storage, operating systems, archives and viewers add, in lower case.
SYSTEM_FOLDERS = frozenset(
    {
        "@__thumb", "@eadir", "@recently-snapshot", "@recycle", "@sharebin", "@tmp", "#recycle", "#snapshot",
        "~snapshot", "$recycle.bin", "recycler", "recycled", "system volume information", "found.000", "lost+found",
        "lost.dir", "network trash folder", "temporary items", "__macosx", "thumbnail", "thumbnails", "thumbs",
    }
)  # fmt: skip
RUN_PICTURES = frozenset({"pictures", "wandb"})  # folders of a training run


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
    archives: bool = True  # whether files in archives are read


MIN_FRAMES = {"min_frames": Option(2, "skip shorter sequences", min=1)}
POSES = {"poses": Option(True, "read poses and intrinsics if present")}
DEPTH = {"depth": Option(True, "list depth maps and masks if present")}
EXCLUDE = {"exclude": Option("", "scenes or categories to skip, separated by commas")}
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


def without_excluded(names: Sequence[str], options: Options) -> list[str]:
    """The names that `--exclude` does not list; names in it that do not exist are logged."""
    excluded = {name.strip() for name in options.exclude.split(",")} - {""}
    if unknown := sorted(excluded.difference(names)):
        log.warning("--exclude names scenes that do not exist: %s", ", ".join(unknown))
    return [name for name in names if name not in excluded]


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


def images_in(folder: Path) -> list[str]:
    """Names of the images in a folder in natural order (2 before 10); empty if there is no such folder.

    Folders, links that lead nowhere, special files and fastmum's own pictures next to photographs are none.
    """
    entries = _entries(folder)
    names = {entry.name for entry in entries}
    images = (entry.name for entry in entries if is_image(entry.name) and _is_file(entry))
    return natsort.natsorted(name for name in images if not _is_own_picture(name, names))


def walk(root: Path, skip: frozenset[str] = frozenset(), level: int = logging.INFO) -> Iterator[tuple[str, list[str]]]:
    """Folders at or below the root, '.' for the root itself, and the names of their files. Each real folder comes once.

    Links are followed last, so that a folder has its own path if it has one below the root. Skipped and counted in
    the log at `level`: folders named as in `skip`, in lower case; hidden ones; `SYSTEM_FOLDERS`; what fastmum wrote;
    links to folders that were listed or that contain the root; folders without permission, which are named.
    """
    seen = {_identity(parent) for parent in root.resolve().parents}
    skipped, unreadable = Counter[str](), list[str]()
    folders, links = [""], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        path = root / folder
        if (identity := _identity(path)) in seen:
            skipped["links to folders that are listed already"] += 1
            continue
        seen.add(identity)
        try:
            entries = natsort.natsorted(_entries(path), key=lambda entry: entry.name)
        except UnreadableFolderError:
            unreadable.append(f"'{path}'")
            continue
        names = {entry.name for entry in entries}
        files, deeper = [], list[str]()
        for entry in entries:
            if _is_dir(entry):
                if reason := _reason_to_skip(entry.name, names, skip):
                    skipped[reason] += 1
                else:
                    (links if entry.is_symlink() else deeper).append(f"{folder}/{entry.name}" if folder else entry.name)
            elif is_image(entry.name) and not _is_file(entry):
                skipped["broken links or special files named like images"] += 1
            elif is_image(entry.name) and _is_own_picture(entry.name, names):
                skipped["pictures that fastmum drew"] += 1
            else:
                files.append(entry.name)
        folders += reversed(deeper)
        yield folder or ".", files
    if skipped:
        what = "; ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        log.log(level, "skipped under %s: %s", root, what)
    if unreadable:
        log.warning("%d folders cannot be read: %s", len(unreadable), some_names(unreadable))


def _reason_to_skip(name: str, names: set[str], skip: frozenset[str]) -> str | None:
    """Why a sub-folder, next to files and folders `names`, is no place for photographs; None if it may be."""
    if name.startswith("."):
        return "hidden folders"
    if name.lower() in SYSTEM_FOLDERS:
        return "folders of thumbnails, deleted files or the system"
    if name.lower() in skip:
        return "folders of depth, masks, labels or normals"
    stem = name.removesuffix("_pictures")
    features = stem != name and not names.isdisjoint({f"{stem}.safetensors", f"{stem}.npz"})
    return "folders that fastmum wrote" if features or (name in RUN_PICTURES and _is_run(names)) else None


def _is_run(names: set[str]) -> bool:
    """Whether a folder of these files and folders is that of a training run."""
    return "config.yaml" in names and not names.isdisjoint({"metrics.jsonl", "manifests", "checkpoints"})


def _is_own_picture(name: str, names: set[str]) -> bool:
    """Whether fastmum drew an image, next to `names`: a contact sheet, the newest of a run, those of evaluations."""
    if name == "reconstruction.png":
        return _is_run(names)
    sheet, result = name.rpartition("_sheet.")[0], name.rpartition("-")[0]
    return f"{sheet}.arrow" in names or (f"{result}.json" in names and "table.md" in names)


def image_folders(root: Path) -> list[str]:
    """The folders of `walk` that contain images, without those of depth, masks, labels and normals, in natural order.

    Images of other formats are counted in the log by their suffixes. DataError: all are of formats that are not read.
    """
    found, suffixes = [], Counter[str]()
    for folder, files in walk(root, OTHER_FOLDERS):
        suffixes.update(os.path.splitext(name)[1].lower() for name in files if not name.startswith("."))
        if any(map(is_image, files)):
            found.append(folder)
    read, others = (
        ", ".join(f"{suffixes[suffix]} {suffix}" for suffix in natsort.natsorted(suffixes.keys() & kind))
        for kind in (IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES)
    )
    if others and not found:
        raise DataError(f"the images under '{root}' are {others}, which are not read; convert them to .png or .jpg")
    if others:
        log.warning("skipped under %s: %s, which are not read; convert them to .png or .jpg", root, others)
    if "," in read:
        log.info("images under %s: %s", root, read)
    key = natsort.natsort_keygen()
    return sorted(found, key=lambda folder: [(key(name), name) for name in folder.split("/") if folder != "."])


def root_name(root: Path) -> str:
    """The name of the folder, or of an archive without its suffix."""
    real = root.resolve()
    return real.stem if real.is_file() else real.name


def folders_in(folder: Path) -> list[str]:
    """Names of the visible sub-folders in natural order, without `SYSTEM_FOLDERS`; empty if there is no such folder."""
    entries = (entry for entry in _entries(folder) if _reason_to_skip(entry.name, set(), frozenset()) is None)
    return natsort.natsorted(entry.name for entry in entries if _is_dir(entry))


def matching_folders(root: Path, pattern: str, needs: str = "") -> list[str]:
    """Folders such as "*/scenes/*" below the root that contain the path `needs`, in natural order.

    Each real folder comes once, under its own path if that matches, too; what links add is counted in the log.
    """
    found = [""]
    for level in pattern.split("/"):
        found = [f"{f}/{n}" for f in found for n in (folders_in(root / f[1:]) if level == "*" else [level])]
    matching = [folder[1:] for folder in found if (root / folder[1:] / needs).exists()]
    paths, top = {folder: os.path.realpath(root / folder) for folder in matching}, os.path.realpath(root)
    first = {real: path for path, real in reversed(paths.items())}
    first |= {real: path for path, real in paths.items() if real == os.path.join(top, path)}
    if len(first) < len(paths):
        log.info("skipped under %s: %d links to folders that are listed already", root, len(paths) - len(first))
    return [path for path, real in paths.items() if first[real] == path]


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


class UnreadableFolderError(DataError):
    """A folder that the user has no permission to list."""


def names_in(folder: Path) -> list[str]:
    """Names of all files and sub-folders; empty if there is no such folder. DataError: it cannot be read."""
    return [entry.name for entry in _entries(folder)]


class Member(NamedTuple):
    """A file or a folder in an archive, as an `os.DirEntry`."""

    name: str
    path: str
    folder: bool

    def is_dir(self) -> bool:
        return self.folder

    def is_file(self) -> bool:
        return not self.folder

    def is_symlink(self) -> bool:
        return False


def _entries(folder: Path) -> "list[os.DirEntry[str] | Member]":
    """The entries of a folder, real ones before those of archives."""
    found: list[os.DirEntry[str] | Member] = []
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        kind = UnreadableFolderError if isinstance(error, PermissionError) else DataError
        raise kind(f"the folder '{folder}' cannot be read ({error.strerror})") from None
    if isinstance(folder, TreePath):
        names = {entry.name for entry in found}
        members = folder.entries(names).items()
        found += [Member(name, f"{folder}/{name}", at is None) for name, at in members if name not in names]
    return found


def _is_file(entry: os.DirEntry[str] | Member) -> bool:
    # DirEntry's own methods raise OSError for links in a circle.
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def _is_dir(entry: os.DirEntry[str] | Member) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _identity(folder: Path) -> tuple[int, int | str]:
    try:
        found = os.stat(folder)
    except OSError:  # it was removed meanwhile
        return -1, str(folder)
    return found.st_dev, found.st_ino or os.path.realpath(folder)  # some file systems have no numbers

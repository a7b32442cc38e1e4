"""Sequences of views to evaluate on: the rendered scenes, or a folder of folders of images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from fastmum.data.builders.base import images_in
from fastmum.data.builders.folder import image_folders
from fastmum.data.errors import DataError
from fastmum.evaluate.pairs.scenes import SIZE, embedded_folders

log = logging.getLogger(__name__)

EMBEDDED = "scenes"


class ViewSequence(NamedTuple):
    """The pictures of one scene, ordered so that neighbours are close in time or space."""

    name: str
    files: list[Path]


class SequenceSet(NamedTuple):
    """At least two sequences; `size` is the default side of the resized pictures in pixels."""

    name: str
    sequences: list[ViewSequence]
    size: int


def open_sequences(name: str, least: int) -> SequenceSet:
    """The sequences with at least `least` views.

    Args:
        name: "scenes" for rendered scenes that no model was trained on, or a folder: each of its sub-folders with
            images is a sequence.

    Raises:
        DataError: no such folder, or fewer than two sequences of that length.
    """
    if name == EMBEDDED:
        folders, size = [*embedded_folders("test"), *embedded_folders("train")], SIZE
        root, title = folders[0].parent, EMBEDDED
    else:
        root, size = Path(name).expanduser(), 224  # of the released training configuration
        if not root.is_dir():
            raise DataError(f"there is no folder '{name}'; a folder or {EMBEDDED} is expected")
        folders, title = [root / folder for folder in image_folders(root)], f"{root.resolve().name} (folder)"
    found = [
        ViewSequence(folder.relative_to(root).as_posix(), [folder / image for image in images_in(folder)])
        for folder in folders
    ]
    kept = [views for views in found if len(views.files) >= least]
    if short := len(found) - len(kept):
        log.warning("%d of %d sequences have fewer than %d views and are skipped", short, len(found), least)
    if len(kept) < 2:
        raise DataError(f"'{name}' has {len(kept)} sequences of at least {least} views, but two are needed")
    return SequenceSet(title, kept, size)

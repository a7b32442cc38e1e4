"""Sequences of views to evaluate on: the rendered scenes, or any folder of folders of images."""

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
    """The views of one scene, neighbours in time or place next to each other.

    Args:
        name: of the scene.
        files: its pictures.
    """

    name: str
    files: list[Path]


class SequenceSet(NamedTuple):
    """Sequences to evaluate on.

    Args:
        name: of the set; that of a folder says so, to be told from the embedded scenes.
        sequences: at least two, so that each has another that shows something else.
        size: side in pixels that pictures are resized to where nobody asks for another.
    """

    name: str
    sequences: list[ViewSequence]
    size: int


def open_sequences(name: str, least: int) -> SequenceSet:
    """The sequences that a user names.

    Args:
        name: scenes (rendered ones that nothing was trained on), or a folder every sub-folder of which, with images in
            it, is a sequence.
        least: views of the shortest sequence that is taken.

    Raises:
        DataError: no such folder, or fewer than two sequences of that length.
    """
    if name == EMBEDDED:
        folders, size = [*embedded_folders("test"), *embedded_folders("train")], SIZE
        root = folders[0].parent
    else:
        root, size = Path(name).expanduser(), 224  # of the released training configuration
        if not root.is_dir():
            raise DataError(f"there is no folder '{name}'; one, or the word {EMBEDDED}, is expected")
        folders = [root / folder for folder in image_folders(root)]
    found = [
        ViewSequence(folder.relative_to(root).as_posix(), [folder / image for image in images_in(folder)])
        for folder in folders
    ]
    kept = [views for views in found if len(views.files) >= least]
    if len(kept) < len(found):
        log.warning(
            "%d of %d sequences have fewer than %d views and are left out", len(found) - len(kept), len(found), least
        )
    if len(kept) < 2:
        raise DataError(f"'{name}' has {len(kept)} sequences of at least {least} views, but two are needed")
    return SequenceSet(EMBEDDED if name == EMBEDDED else f"{root.resolve().name} (folder)", kept, size)

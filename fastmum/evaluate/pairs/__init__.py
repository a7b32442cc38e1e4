"""Pairs of pictures with cameras and depth: the sets that `--data` names, a layout a file.

A set is named by a word (`scenes`, `motorcycle`), by a path whose content says what it is, or by both
(`megadepth:/path`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from fastmum.data.errors import DataError
from fastmum.evaluate.pairs import jsonl, megadepth, motorcycle, navi, scannet, scenes
from fastmum.evaluate.pairs.pair import Camera, Frame, Pair, PairSet, relative_pose, unit_camera

__all__ = ["SETS", "Camera", "Frame", "Pair", "PairSet", "open_pairs", "relative_pose", "unit_camera"]

Part = Literal["test", "train", "all"]


class Layout(NamedTuple):
    """A kind of set.

    Args:
        meaning: for the help.
        embedded: opens the set that needs no path, None where there is none.
        open: opens a set at a path, None where there is none.
        recognises: whether a path holds such a set.
    """

    meaning: str
    embedded: Callable[[str], PairSet] | None = None
    open: Callable[[Path, str], PairSet] | None = None
    recognises: Callable[[Path], bool] = lambda path: False


SETS: dict[str, Layout] = {
    "scenes": Layout(
        "rendered scenes: those of its own, or a folder with scene_0000, ...",
        scenes.embedded,
        scenes.from_root,
        scenes.is_scenes,
    ),
    "motorcycle": Layout("Middlebury's stereo pair of that name, from scikit-image", motorcycle.stereo),
    "pairs": Layout("pairs.jsonl: pictures, K, T_b_a and depth, a pair a line", None, jsonl.from_file, jsonl.is_jsonl),
    "scannet": Layout("ScanNet-1500 as LoFTR, DKM and RoMa have it", None, scannet.from_root, scannet.is_scannet),
    "megadepth": Layout(
        "MegaDepth-1500 as LoFTR, DKM and RoMa have it", None, megadepth.from_root, megadepth.is_megadepth
    ),
    "navi": Layout("NAVI, for recall by cosine matching after Probe3D", None, navi.from_root, navi.is_navi),
}


def open_pairs(name: str, part: Part = "all") -> PairSet:
    """The set that a user names.

    Args:
        name: a word, a path, or both with a colon between, as in `SETS`.
        part: "train" and "test" share no scene (or no picture); "all" is what may be tested on without training.

    Raises:
        DataError: no such set, or one that cannot be read.
    """
    word, colon, rest = name.partition(":")
    if word in SETS and (colon or name == word):
        layout = SETS[word]
        if not rest and layout.embedded is not None:
            return layout.embedded(part)
        if not rest or layout.open is None:
            form = f"{word}:/path" if layout.open else word
            raise DataError(f"'{name}' names no data: write {form}")
        return layout.open(_existing(rest), part)
    path = _existing(name)
    for layout in SETS.values():
        if layout.open is not None and layout.recognises(path):
            return layout.open(path, part)
    raise DataError(f"'{name}' holds no set of pairs that is known here: {', '.join(SETS)} (see --help)")


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        words = [word for word, layout in SETS.items() if layout.embedded is not None]
        raise DataError(f"there is no '{name}'; a path, or one of {', '.join(words)}, is expected")
    return path

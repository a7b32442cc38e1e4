"""Pairs of images with cameras and depth: the sets that `--data` names, one layout per file.

A set is named by a word (`scenes`, `motorcycle`), by a path whose content identifies the layout, or by both
(`megadepth:/path`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from fastmum.data.errors import DataError
from fastmum.data.samples import Frame
from fastmum.evaluate.pairs import jsonl, megadepth, motorcycle, navi, scannet, scenes
from fastmum.evaluate.pairs.pair import Pair, PairSet, overlap, pair_warp
from fastmum.files import expand_user

__all__ = ["SETS", "Frame", "Pair", "PairSet", "open_pairs", "overlap", "pair_warp", "same_set"]

Part = Literal["test", "train", "all", "trainable"]


class Layout(NamedTuple):
    """A kind of set. Both openers take a part ("test", "train" or "all") and raise `DataError`.

    `splits`: "test" and "train" are cut from one set, so all of it may be trained on if none of it is tested on. Else
    "all" is the published test set.
    """

    meaning: str  # for the help
    embedded: Callable[[str], PairSet] | None = None  # opens a set that needs no path
    open: Callable[[Path, str], PairSet] | None = None  # opens a set at a path
    recognises: Callable[[Path], bool] = lambda path: False
    splits: bool = False


SETS: dict[str, Layout] = {
    "scenes": Layout("rendered scenes: the embedded ones, or a folder with scene_0000, ...",
                     scenes.embedded, scenes.from_root,
                     lambda root: any(root.glob("scene_*/cameras.json")), splits=True),
    "motorcycle": Layout("Middlebury's stereo pair of that name, from scikit-image", motorcycle.stereo),
    "pairs": Layout("pairs.jsonl: images, K, T_b_a and depth, one pair per line",
                    None, jsonl.from_file,
                    lambda path: jsonl.file_of(path).is_file() and jsonl.file_of(path).suffix == ".jsonl", splits=True),
    "scannet": Layout("ScanNet-1500 as LoFTR, DKM and RoMa have it", None, scannet.from_root,
                      lambda root: any((root / name).is_file() for name in scannet.TEST_FILES)),
    "megadepth": Layout("MegaDepth-1500 as LoFTR, DKM, RoMa and Reloc3r have it", None, megadepth.from_root,
                        lambda root: bool(megadepth.information_files(root, "test"))),
    "navi": Layout("NAVI, for recall by cosine matching after Probe3D", None, navi.from_root,
                   lambda root: any(root.glob("*/wild_set/annotations.json"))),
}  # fmt: skip


def open_pairs(name: str, part: Part = "all", needs_depth: bool = True, matchbench: bool = False) -> PairSet:
    """The set that a user names by a word, a path, or both with a colon between; DataError if it cannot be read.

    `needs_depth=False` also takes pairs without depth, of a `pairs.jsonl` or Reloc3r's MegaDepth-1500. With
    `matchbench`, MegaDepth's test pairs are the 1,000 random ones of that protocol.

    Of the parts, "train" and "test" share no scene (or no image); "all" may be tested on without training, "trainable"
    may be trained on if nothing of the set is tested on.
    """
    layout, path = _find(name)
    if part == "trainable":
        part = "all" if layout.splits and path is not None else "train"
    if path is None:
        assert layout.embedded is not None
        return layout.embedded(part)
    if layout is SETS["pairs"]:
        return jsonl.from_file(path, part, needs_depth)
    assert layout.open is not None
    chosen = matchbench and part in ("test", "all") and layout is SETS["megadepth"]
    pairs = layout.open(path, "matchbench" if chosen else part)
    if needs_depth and pairs.pairs and pairs.pairs[0].a.depth is None:
        raise DataError(f"'{path}' has no depth, which this evaluation needs; `evaluate pose` does without")
    return pairs


def same_set(one: str, other: str) -> bool:
    """Whether two names of sets mean the same data; raises `DataError` if there is no such set."""
    (layout, path), (other_layout, other_path) = map(_find, (one, other))
    if layout is not other_layout or path is None or other_path is None:
        return layout is other_layout and path is other_path
    return jsonl.file_of(path).resolve() == jsonl.file_of(other_path).resolve()


def _find(name: str) -> tuple[Layout, Path | None]:
    """The layout of a set that a user names, and its path; None for an embedded set."""
    word, colon, rest = name.partition(":")
    if word in SETS and (colon or name == word):
        layout = SETS[word]
        if not rest and layout.embedded is not None:
            return layout, None
        if not rest or layout.open is None:
            raise DataError(f"'{name}' names no data: write {f'{word}:/path' if layout.open else word}")
        return layout, _existing(rest)
    path = _existing(name)
    for layout in SETS.values():
        if layout.recognises(path):
            return layout, path
    raise DataError(f"'{name}' holds no set of pairs of a known layout: {', '.join(SETS)} (see --help)")


def _existing(name: str) -> Path:
    path = expand_user(name)
    if not path.exists():
        words = [word for word, layout in SETS.items() if layout.embedded is not None]
        raise DataError(f"there is no '{name}'; a path, or one of {', '.join(words)}, is expected")
    return path

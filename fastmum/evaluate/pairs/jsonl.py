"""Sets of pairs in a text file: `pairs.jsonl`, one JSON record a line.

A record has `image_a`, `image_b`, `depth_a`, `depth_b` (paths, relative to the file's folder or one above it), `K_a`,
`K_b` (3 x 3, pixels of the pictures), `T_b_a` (4 x 4, camera a to camera b), and may have `id` (no two alike), `set`
(or `scene`) and `depth_unit` (what the depth's numbers are multiplied by; 0.001 for PNGs, millimetres in metres, else
1).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from fastmum.data.errors import DataError
from fastmum.evaluate.pairs.pair import Frame, Pair, PairSet
from fastmum.evaluate.pairs.reading import frame_of, matrix, square

log = logging.getLogger(__name__)

SIZE = 448  # of RoMa's metrics
PNG_UNIT = 1e-3  # metres a count of depth
PARENTS = 3  # folders, from the file's own upwards, that paths are looked for in
NEEDED = ("image_a", "image_b", "K_a", "K_b", "T_b_a")


def is_jsonl(path: Path) -> bool:
    """Whether a path is such a file, or a folder with a `pairs.jsonl`."""
    return path.suffix == ".jsonl" if path.is_file() else (path / "pairs.jsonl").is_file()


def file_of(path: Path) -> Path:
    """The file itself, given it or its folder."""
    return path if path.is_file() else path / "pairs.jsonl"


def from_file(path: Path, part: str) -> PairSet:
    """The pairs of a file that have depth on both sides.

    Args:
        path: the file, or the folder that holds `pairs.jsonl`.
        part: "test" or "train", which share no picture (`split`), or "all".

    Raises:
        DataError: a file or record that cannot be read, or no pair with depth.
    """
    file = file_of(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"'{file}' cannot be read ({getattr(error, 'strerror', None) or error})") from None
    found = {number: _pair(line, file, number) for number, line in enumerate(lines, 1) if line.strip()}
    pairs = [pair for pair in found.values() if pair is not None]
    first: dict[str, int] = {}
    for number, pair in found.items():
        if pair is not None and first.setdefault(pair.name, number) != number:
            raise DataError(
                f"line {number} of '{file}' has the id '{pair.name}' of line {first[pair.name]}: "
                "every pair needs its own"
            )
    if len(pairs) < len(found):
        log.warning("%s: %d of %d pairs have no depth and are passed over", file, len(found) - len(pairs), len(found))
    if not pairs:
        raise DataError(f"'{file}' has no pair with depth_a and depth_b, and true warps need both")
    name = file.parent.name if file.stem == "pairs" else file.stem
    test, train = split(pairs)
    if part != "train":
        return PairSet(name, pairs if part == "all" else test, SIZE)
    if not train:
        raise DataError(f"the pairs of '{file}' share pictures, so none is left to train on: name --train-data")
    return PairSet(name, train, SIZE)


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs to test and to train on, such that no picture is in both: about half each.

    Pairs that share pictures stay together, in the order of the file; the first half is tested on.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while (above := parent.setdefault(key, key)) != key:
            key = above
        return key

    for pair in pairs:
        parent[root(pair.b.key)] = root(pair.a.key)
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(root(pair.a.key), []).append(pair)
    test: list[Pair] = []
    train: list[Pair] = []
    for group in groups.values():
        (test if len(test) < len(pairs) / 2 else train).extend(group)
    return test, train


def _pair(line: str, file: Path, number: int) -> Pair | None:
    where = f"line {number} of '{file}'"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error})") from None
    if not isinstance(record, dict) or (missing := [key for key in NEEDED if key not in record]):
        raise DataError(f"{where} lacks {', '.join(missing) if isinstance(record, dict) else 'a record'}")
    if not record.get("depth_a") or not record.get("depth_b"):
        return None
    a, b = (_frame(record, side, file, where) for side in "ab")
    name = str(record.get("id", f"{number:06d}"))
    scene = str(record.get("scene") or record.get("set") or file.stem)
    return Pair(name, scene, a, b, square(record["T_b_a"], 4, f"T_b_a in {where}"))


def _frame(record: dict[str, Any], side: str, file: Path, where: str) -> Frame:
    image, depth = (_find(record[f"{kind}_{side}"], file) for kind in ("image", "depth"))
    unit = record.get("depth_unit", PNG_UNIT if depth.suffix == ".png" else 1.0)
    return frame_of(
        record[f"image_{side}"],
        image,
        depth,
        square(record[f"K_{side}"], 3, f"K_{side} in {where}"),
        float(matrix(unit, (), f"depth_unit in {where}")),
    )


def _find(name: object, file: Path) -> Path:
    if not isinstance(name, str):
        raise DataError(f"{name!r}, named in '{file}', is not a path")
    folders = [file.absolute().parent, *file.absolute().parent.parents][:PARENTS]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"'{name}', named in '{file}', is neither in its folder nor in the two above it")

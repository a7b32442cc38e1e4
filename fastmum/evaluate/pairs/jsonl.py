"""Sets of pairs in a text file: `pairs.jsonl`, one JSON record per line.

A record has `image_a`, `image_b`, `depth_a`, `depth_b` (paths, relative to the file's folder or one above it), `K_a`,
`K_b` (3 x 3, pixels of the images), `T_b_a` (4 x 4, camera a to camera b), and may have `id` (unique), `set` (or
`scene`) and `depth_unit` (factor of the stored depth; default 0.001 for PNGs, which are millimetres, else 1).
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError, reading
from fastmum.data.samples import Frame
from fastmum.evaluate.pairs.pair import Pair, PairSet, matrix, rigid, square

log = logging.getLogger(__name__)

PARENTS = 3  # folders that paths are searched in, from that of the file upwards
NEEDED = ("image_a", "image_b", "K_a", "K_b", "T_b_a")
DEPTHS = {".png": DepthFormat("png16", 1e-3), ".npy": DepthFormat("npy"), ".h5": DepthFormat("hdf5")}


def file_of(path: Path) -> Path:
    """The file, given it or its folder."""
    return path if path.is_file() else path / "pairs.jsonl"


def from_file(path: Path, part: str, needs_depth: bool = True) -> PairSet:
    """The pairs of a file, or of the `pairs.jsonl` in a folder, by default those with depth on both sides: `split`."""
    file = file_of(path)
    with reading(file, "a text file"):
        text = file.read_text(encoding="utf-8-sig")
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    pairs: list[Pair] = []
    first: dict[str, int] = {}
    for number, line in lines:
        pair = _pair(line, file, number, needs_depth)
        if pair is None:
            continue
        if first.setdefault(pair.name, number) != number:
            raise DataError(f"line {number} of '{file}' has the id '{pair.name}' of line {first[pair.name]}")
        pairs.append(pair)
    if len(pairs) < len(lines):
        log.warning("%s: %d of %d pairs have no depth and are skipped", file, len(lines) - len(pairs), len(lines))
    if not pairs:
        need = " with depth_a and depth_b, and true warps need both" if needs_depth else ""
        raise DataError(f"'{file}' has no pair{need}")
    name = file.absolute().parent.name if file.stem == "pairs" else file.stem
    test, train = split(pairs)
    pairs = {"all": pairs, "test": test, "train": train}[part]
    if not pairs:
        raise DataError(f"the pairs of '{file}' share pictures, so none is left to train on: name --train-data")
    return PairSet(name, pairs)


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Test and training pairs that share no image, about half each.

    Pairs that share images stay together, in the order of the file; the first half is for testing.
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
    test, train = list[Pair](), list[Pair]()
    for group in groups.values():
        (test if len(test) < len(pairs) / 2 else train).extend(group)
    return test, train


def _pair(line: str, file: Path, number: int, needs_depth: bool) -> Pair | None:
    where = f"line {number} of '{file}'"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error})") from None
    if not isinstance(record, dict) or (missing := [key for key in NEEDED if key not in record]):
        raise DataError(f"{where} lacks {', '.join(missing) if isinstance(record, dict) else 'a record'}")
    if needs_depth and not (record.get("depth_a") and record.get("depth_b")):
        return None
    a = _frame(record, "a", np.eye(4), file, where)
    b = _frame(record, "b", rigid(record["T_b_a"], f"T_b_a in {where}"), file, where)
    scene = str(record.get("scene") or record.get("set") or file.stem)
    return Pair(str(record.get("id", f"{number:06d}")), scene, a, b)


def _frame(record: dict[str, Any], side: str, pose: np.ndarray, file: Path, where: str) -> Frame:
    image, K = _find(record[f"image_{side}"], file), square(record[f"K_{side}"], 3, f"K_{side} in {where}")
    if not record.get(f"depth_{side}"):
        return Frame(record[f"image_{side}"], image, K, pose)
    depth = _find(record[f"depth_{side}"], file)
    if depth.suffix not in DEPTHS:
        raise DataError(f"depth '{depth}' ends in '{depth.suffix}', but one of {', '.join(DEPTHS)} is expected")
    stored = DEPTHS[depth.suffix]
    unit = float(matrix(record.get("depth_unit", stored.unit), (), f"depth_unit in {where}"))
    return Frame(record[f"image_{side}"], image, K, pose, depth, stored._replace(unit=unit))


def _find(name: object, file: Path) -> Path:
    if not isinstance(name, str):
        raise DataError(f"{name!r}, named in '{file}', is not a path")
    folders = [file.absolute().parent, *file.absolute().parent.parents][:PARENTS]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"'{name}', named in '{file}', is neither in its folder nor in the two above it")

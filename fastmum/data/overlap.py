"""Overlap of the frames of a sequence from depth and cameras: which pairs see the same part of a scene.

Tables are computed once per manifest and kept in the cache folder.
"""

import itertools
import logging
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmum.data.depth import require_package
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifest, Manifests
from fastmum.data.samples import Frame, manifest_frame
from fastmum.data.scene_info import SCENE_INFO, listed_pairs
from fastmum.data.scene_plan import usable_frames
from fastmum.errors import first_line, writing
from fastmum.files import atomic_path, cache_folder
from fastmum.geometry import relative_pose
from fastmum.geometry.warp import grid_points, true_warp
from fastmum.progress import progress_bar

log = logging.getLogger(__name__)

VERSION = 1  # increased whenever the same manifest gives another table
GRID = 36, 48  # rows and columns of the points of an image whose overlap is counted
SCENE_PAIRS = 20_000  # of a scene that are looked at, the same number in each of its sequences
LEAST_PAIRS = 16  # of a sequence
LEAST = 0.01  # overlap of a pair that is kept: RoMa's least
FILES = 64  # of a table, at most: an interrupted computation goes on with the first that is missing
BLOCK = 256  # pairs that are computed at once
KEPT_MAPS = 4096  # reduced depth maps in memory, 7 kB each
POINTS = grid_points(*GRID).float()


# Data sets that come with pairs and their overlap, by the builder of the manifest.
LISTS: dict[str, Callable[[Manifest], tuple[np.ndarray, np.ndarray]]] = {SCENE_INFO: listed_pairs}


class PairTable(NamedTuple):
    """Pairs of frames with their overlap, sequence by sequence."""

    rows: np.ndarray  # (N, 2) int64, rows of the manifests
    # (N,) float32, at least `LEAST`: share of a frame's known depth that the other one sees, the smaller
    overlap: np.ndarray


class _Block(NamedTuple):
    """Pairs of some sequences, and messages about frames that cannot be read."""

    rows: np.ndarray  # (N, 2) int32
    overlap: np.ndarray  # (N,) float32
    bad: list[str]


class _Reduced(NamedTuple):
    depth: Tensor  # GRID float32
    K: Tensor  # (3, 3) float64, in cells of the grid
    pose: np.ndarray  # (4, 4) float64


def pair_table(manifests: Manifests, workers: int = 2, datasets: Collection[str] | None = None) -> PairTable:
    """The pairs of frames with pose, intrinsics and depth, from the cache or computed with `workers` threads.

    Manifests without any of `datasets` (None: all) are left out.

    Of each sequence all pairs are looked at, or a random choice of them if there are many: `SCENE_PAIRS` in a scene.
    DataError: a package that reads the depth maps is not installed, or the cache folder cannot be written.
    """
    rows, overlaps, first = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)], 0
    for part in manifests.parts:
        if part.known["depth"] and (datasets is None or not {*part.datasets}.isdisjoint(datasets)):
            builder = part.metadata.get("builder")
            found = PairTable(*LISTS[builder](part)) if builder in LISTS else _cached(part, workers)
            rows.append(found.rows + first)
            overlaps.append(found.overlap)
        first += part.num_frames
    return PairTable(np.concatenate(rows), np.concatenate(overlaps))


def frame_overlap(a: Sequence[Frame], b: Sequence[Frame]) -> np.ndarray:
    """Overlap of pairs of frames that have depth, pose and intrinsics, (n,) float32: see `PairTable`."""
    return _overlap([_reduce(frame) for frame in a], [_reduce(frame) for frame in b])


def _cached(part: Manifest, workers: int) -> PairTable:
    # The checksum covers all paths and cameras; files that were replaced since are not noticed.
    folder, count = cache_folder() / "overlap" / f"v{VERSION}-{part.checksum}", part.num_sequences
    size = max(1, -(-count // FILES))
    blocks = [range(first, min(first + size, count)) for first in range(0, count, size)]
    found = {block: _read(_file(folder, block)) for block in blocks}
    if missing := [block for block, held in found.items() if held is None]:
        found |= _compute(part, workers, folder, missing)
    rows, overlaps, messages = zip(*(held for held in found.values() if held is not None), strict=True)
    if bad := list(dict.fromkeys(itertools.chain(*messages))):
        log.warning(
            "%s: %d frames are in no pair, since their depth or image cannot be read; remove '%s' if they can be now. "
            "The first: %s", part.path, len(bad), folder, bad[0],
        )  # fmt: skip
    return PairTable(np.concatenate(rows).astype(np.int64), np.concatenate(overlaps))


def _file(folder: Path, block: range) -> Path:
    return folder / f"{block.start}-{block.stop}.npz"


def _read(file: Path) -> _Block | None:
    try:
        with np.load(file, allow_pickle=False) as saved:
            return _Block(saved["rows"], saved["overlap"], saved["bad"].tolist())
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("'%s' cannot be read (%s): it is computed again", file, first_line(error))
    return None


def _compute(part: Manifest, workers: int, folder: Path, blocks: Sequence[range]) -> dict[range, _Block]:
    """The pairs of blocks of sequences, each written to its file as soon as it is known."""
    for reader in sorted(part.depth_readers):
        require_package(reader, "the depth of a data set")
    scenes = part.scene_names(np.arange(part.num_sequences))
    names, of_scene = np.unique(np.array(scenes), return_inverse=True)
    most = np.maximum(LEAST_PAIRS, SCENE_PAIRS // np.bincount(of_scene, minlength=len(names)))[of_scene]
    usable, maps = usable_frames(part, 2), _Maps(part)

    def one(sequence: int) -> PairTable:
        first, end = part.starts[sequence : sequence + 2]
        rows = first + np.flatnonzero(usable[first:end])
        pairs = rows[_choose(len(rows), int(most[sequence]), sequence)]
        overlaps = np.zeros(len(pairs), np.float32)
        for start in range(0, len(pairs), BLOCK):
            block = pairs[start : start + BLOCK]
            seen = {row: maps.get(row) for row in np.unique(block).tolist()}
            ends = [(seen[a], seen[b]) for a, b in block.tolist()]
            both = [(i, a, b) for i, (a, b) in enumerate(ends, start) if a is not None and b is not None]
            if both:
                numbers, *sides = zip(*both, strict=True)
                overlaps[list(numbers)] = _overlap(*sides)
        keep = overlaps >= LEAST
        return PairTable(pairs[keep], overlaps[keep])

    found, todo = {}, [*itertools.chain(*blocks)]
    what: dict[str, Any] = {"total": len(todo), "unit": "sequence", "desc": f"overlap of {part.path.stem}"}
    pool = ThreadPoolExecutor(workers)
    try:
        tables = iter(progress_bar(pool.map(one, todo), leave=False, **what))
        for block in blocks:
            rows, overlap = map(np.concatenate, zip(*itertools.islice(tables, len(block)), strict=True))
            found[block] = _Block(rows.astype(np.int32), overlap, [*maps.bad])
            with writing(folder, DataError):
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_path(_file(folder, block)) as path, open(path, "wb") as stream:
                    np.savez(stream, **found[block]._asdict())
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _choose(count: int, most: int, seed: int) -> np.ndarray:
    """Pairs i < j of `count` frames, (n, 2) int64: all, or about `most` random ones without replacement."""
    total = count * (count - 1) // 2
    if total <= most:
        return np.stack(np.triu_indices(count, 1), 1)
    drawn = np.random.default_rng(seed).integers(count, size=(2 * most, 2))
    drawn = np.unique(np.sort(drawn[drawn[:, 0] != drawn[:, 1]], 1), axis=0)
    return np.random.default_rng(seed).permutation(drawn)[:most]


class _Maps:
    """Reduced frames of a manifest, the latest in memory since sequences share images; None for unreadable ones."""

    def __init__(self, part: Manifest) -> None:
        self._part, self._lock = part, threading.Lock()
        self._kept = OrderedDict[Path | None, _Reduced | None]()
        self.bad: list[str] = []

    def get(self, row: int) -> _Reduced | None:
        frame = manifest_frame(self._part, row)
        with self._lock:
            if frame.depth in self._kept:
                return self._kept[frame.depth]
        try:
            found = _reduce(frame)
        except DataError as error:
            found = None
            self.bad.append(str(error))
        with self._lock:
            self._kept[frame.depth] = found
            if len(self._kept) > KEPT_MAPS:
                self._kept.popitem(last=False)
        return found


def _reduce(frame: Frame) -> _Reduced:
    """The depth in the centres of the cells of `GRID`; DataError if the files cannot be read."""
    depth, camera = frame.read_depth(), frame.read_camera()
    assert depth is not None, frame
    assert camera is not None, frame
    rows, columns = (
        ((np.arange(n) + 0.5) * size / n).astype(np.int64) for n, size in zip(GRID, depth.shape, strict=True)
    )
    reduced = torch.from_numpy(depth[rows[:, None], columns])
    return _Reduced(reduced, torch.from_numpy(camera.resized(GRID[::-1]).K), camera.camera_from_world)


def _overlap(a: Sequence[_Reduced], b: Sequence[_Reduced]) -> np.ndarray:
    depths, Ks = ([torch.stack([each[i] for each in side]) for side in (a, b)] for i in (0, 1))  # type: ignore
    shares = []
    for i, (one, other) in enumerate(((a, b), (b, a))):
        T = torch.from_numpy(relative_pose(*(np.stack([each.pose for each in side]) for side in (one, other))))
        warp = true_warp(POINTS.expand(len(a), -1, -1), depths[i], depths[1 - i], Ks[i], Ks[1 - i], T)
        shares.append(warp.visible.sum(1) / (depths[i] > 0).flatten(1).sum(1).clamp(min=1))
    return torch.minimum(*shares).numpy()

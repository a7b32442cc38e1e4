"""Sampling of pairs of frames with cameras, by overlap or by distance in the sequence.

A plan is a pure function of (seed, step, rank, world size), like those of pretraining (`fastmum.data.plan`).
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from fastmum.data.colour import NOTHING, draw_jitter
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests
from fastmum.data.overlap import pair_table
from fastmum.data.packing import cumulative
from fastmum.data.pair_lists import rows_of_list
from fastmum.data.plan import given_weights
from fastmum.data.scene_plan import GROUND_TRUTH, by_builder, usable_frames

SAMPLING = ("auto", "overlap", "distance")
ANY = 1 << 30  # frames
# Least and most distance of the frames of a pair in their sequence, by the builder of the manifest or the name of the
# data set. The first three are Reloc3r's training; it reads lists of pairs of the others (`fastmum.data.pair_lists`).
GAPS = {
    "scannet": (10, 500), "wildrgbd": (1, ANY), "vkitti2": (1, 100), "realestate10k": (10, 100), "dl3dv": (1, 20),
}  # fmt: skip
DEFAULT_GAPS = (1, 10)


class PairPlan(NamedTuple):
    """What one rank decodes for one step: pair after pair, two frames each, all of one size."""

    rows: np.ndarray  # (2 B,) int64, rows of the manifests
    lengths: np.ndarray  # (B,) int64, all 2
    size: tuple[int, int]  # width and height in pixels
    jitter: np.ndarray  # (2 B, JITTER_WIDTH), for `fastmum.data.colour.jitter`
    shift: np.ndarray  # (B, 2) int64, pixels that both frames are moved to the right and down
    flip: np.ndarray  # (B,) bool, both frames are mirrored left to right after that


class Pairs(Protocol):
    """The pairs of a data set."""

    def __len__(self) -> int:
        """A number that is 0 if there are none."""

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The rows of a random pair, (2,) int64."""


class ListedPairs:
    """Pairs of a list `rows` (N, 2) with their `overlap` (N,), NaN if unknown; uniform, in either order."""

    def __init__(self, rows: np.ndarray, overlap: np.ndarray) -> None:
        self.rows, self.overlap = rows, overlap

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return self.rows[rng.integers(len(self.rows)), :: rng.choice((1, -1))]


class DistantPairs:
    """A uniform frame, and another one of its sequence, uniform among those `gaps` frames away on either side.

    `rows` (n,) are those of some sequences that can be drawn, ascending, and `sequence_of` (n,) their sequences.
    """

    def __init__(self, rows: np.ndarray, sequence_of: np.ndarray, gaps: tuple[int, int]) -> None:
        self.rows, (least, most) = rows, gaps
        _, first, inverse, counts = np.unique(sequence_of, return_index=True, return_inverse=True, return_counts=True)
        earliest, latest = rows[first][inverse], rows[first + counts - 1][inverse]
        # Frames on the left are `rows[...: _left_end]`, on the right `rows[_right_start: ...]`.
        self._left_end = np.searchsorted(rows, rows - least, side="right")
        self._right_start = np.searchsorted(rows, rows + least)
        left_start = np.searchsorted(rows, np.maximum(rows - most, earliest))
        right_end = np.searchsorted(rows, np.minimum(rows + most, latest), side="right")
        self._left = np.maximum(0, self._left_end - left_start)
        self._right = np.maximum(0, right_end - self._right_start)
        self._anchors = np.flatnonzero(self._left + self._right)

    def __len__(self) -> int:
        return len(self._anchors)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        anchor = int(rng.choice(self._anchors))
        k, left = int(rng.integers(self._left[anchor] + self._right[anchor])), int(self._left[anchor])
        other = self._left_end[anchor] - 1 - k if k < left else self._right_start[anchor] + k - left
        return self.rows[[anchor, other]]


class PairPlanner:
    """Draws plans: for every pair a data set, then a pair of its frames that have pose and intrinsics.

    DataError: there is none, or settings that cannot be met. Subclasses may draw otherwise (`draw`).

    Args:
        weights: of data sets by name, default 1; 0 excludes a set.
        size: width and height of all frames.
        sampling: "overlap": pairs that overlap by a share in the range `overlap` (`fastmum.data.overlap`), which needs
            depth; "distance": by `gaps`; "auto": all pairs of a list (`fastmum.data.pair_lists`) where `gaps` names no
            distance, else by overlap where depth is known and there is no distance.
        gaps: least and most distance in frames by data set, beside those of `GAPS`.
        depth: whether frames need depth.
        augment: `jitter`, `shift` and `flip`; otherwise none of them.
        jitter: random colours, each frame its own (Reloc3r's training).
        shift: largest shift of both frames of a pair, pixels along either axis.
        flip: mirror both frames of every second pair, and the world.
        exclude, only: sequences never to draw from, and sequences to draw from (None: all).
        workers: threads that compute overlaps.

    Attributes:
        usable: (frames,) bool, the rows that can be drawn, also from sequences of `exclude`.
        digests: of the pairs of each data set that has a list or table of them, by name.
        notes: one line per data set that is never drawn, or whose sequences are shorter than its distances.
    """

    def __init__(
        self, manifests: Manifests, weights: Mapping[str, float] | None = None, pairs_per_batch: int = 32,
        size: tuple[int, int] = (256, 256), seed: int = 0, world_size: int = 1, *, sampling: str = "auto",
        overlap: tuple[float, float] = (0.1, 0.7), gaps: Mapping[str, tuple[int, int]] | None = None,
        depth: bool = False, augment: bool = True, exclude: Iterable[int] = (), only: Iterable[int] | None = None,
        workers: int = 2, jitter: bool = True, shift: int = 0, flip: bool = False,
    ) -> None:  # fmt: skip
        if sampling not in SAMPLING:
            raise DataError(f"the sampling of pairs is '{sampling}', but must be one of {', '.join(SAMPLING)}")
        self.manifests, self.pairs_per_batch, self.size = manifests, pairs_per_batch, size
        self.seed, self.world_size, self.depth = seed, world_size, depth
        self.jitter, self.shift, self.flip = augment and jitter, augment * shift, augment and flip
        self.overlap, self.notes = overlap, list[str]()
        self.usable = usable_frames(manifests, 2, GROUND_TRUTH if depth else GROUND_TRUTH[:2])
        keep = np.full(manifests.num_sequences, only is None)
        keep[np.array(() if only is None else list(only), np.int64)] = True
        keep[np.array(list(exclude), np.int64)] = False
        by_name = given_weights(manifests.datasets, weights or {}, self.notes)
        self.pairs = self._find_pairs(sampling, (gaps or {}), keep, workers, by_name > 0)
        for name, pairs, weight in zip(manifests.datasets, self.pairs, by_name, strict=True):
            if weight and not len(pairs):
                self.notes.append(
                    f"data set '{name}' is never drawn: it has no pair of frames{' with depth' * depth} to draw"
                )
        self.digests = {
            f"pairs of '{name}'": xxhash.xxh3_64_hexdigest(pairs.rows.tobytes())
            for name, pairs in zip(manifests.datasets, self.pairs, strict=True)
            if isinstance(pairs, ListedPairs)
        }
        drawn = by_name * [len(pairs) > 0 for pairs in self.pairs]
        if not drawn.any():
            what = f"pose and intrinsics{' and depth' * depth}, overlap in {list(overlap)} or a distance in data.gaps"
            raise DataError(f"there is no pair of frames to draw ({what}) in a data set of weight above 0")
        self._chances = cumulative(drawn)

    def _find_pairs(
        self, sampling: str, given: Mapping[str, tuple[int, int]], keep: np.ndarray, workers: int, wanted: np.ndarray,
    ) -> list[Pairs]:  # fmt: skip
        manifests = self.manifests
        for name in given.keys() - {*manifests.datasets, *GAPS}:
            raise DataError(f"data.gaps names '{name}', but the data sets are {', '.join(manifests.datasets)}")
        gaps = [by_builder({**GAPS, **given}, manifests, name) for name in manifests.datasets]
        dataset_of_row = np.repeat(manifests.dataset_of, np.diff(manifests.starts))
        with_depth = np.bincount(dataset_of_row[manifests.present("depth")], minlength=len(gaps)) > 0
        auto = sampling == "auto"
        own_lists = [
            rows_of_list(manifests, name) if auto and drawn and by_builder(given, manifests, name) is None else None
            for name, drawn in zip(manifests.datasets, wanted, strict=True)
        ]
        listed = [drawn and (sampling == "overlap" or (auto and own is None and depth and pairs is None))
                  for drawn, own, depth, pairs in zip(wanted, gaps, with_depth, own_lists, strict=True)]  # fmt: skip
        sequence_of = np.repeat(np.arange(manifests.num_sequences), np.diff(manifests.starts))
        usable = self.usable & keep[sequence_of]
        rows = np.flatnonzero(usable)
        named = {name for name, by_overlap in zip(manifests.datasets, listed, strict=True) if by_overlap}
        table, (low, high) = pair_table(manifests, workers, named), self.overlap
        chosen = (table.overlap >= low) & (table.overlap <= high) & usable[table.rows].all(1)
        listed_rows, overlaps = table.rows[chosen], table.overlap[chosen]
        found: list[Pairs] = []
        for i, (drawn, by_overlap, own, pairs) in enumerate(zip(wanted, listed, gaps, own_lists, strict=True)):
            if pairs is not None:
                pairs = pairs[usable[pairs].all(1)]
                found.append(ListedPairs(pairs, np.full(len(pairs), np.nan, np.float32)))
            elif by_overlap or not drawn:
                own_pairs = dataset_of_row[listed_rows[:, 0]] == i
                found.append(ListedPairs(listed_rows[own_pairs], overlaps[own_pairs]))
            else:
                mine, distances = rows[dataset_of_row[rows] == i], own or DEFAULT_GAPS
                found.append(DistantPairs(mine, sequence_of[mine], distances))
                longest = int(np.diff(manifests.starts)[manifests.dataset_of == i].max(initial=0))
                if distances[0] < longest <= distances[1] // 2 and distances[1] < ANY:
                    self.notes.append(
                        f"sequences of '{manifests.datasets[i]}' have at most {longest} frames, so pairs are not up to "
                        f"{distances[1]} frames apart; builders with --chunk give whole videos with --chunk 0"
                    )
        return found

    def plan(self, step: int, rank: int = 0) -> PairPlan:
        """The plan of a rank for a step."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not one of {self.world_size}")
        rng = np.random.default_rng((self.seed, step, rank))
        count = self.pairs_per_batch
        rows = self.draw(step, rank, rng).reshape(-1)
        colours = draw_jitter(rng, 2 * count, applied=1.0, grey=0.0)
        if not self.jitter:
            colours = np.tile(NOTHING, (2 * count, 1))
        shift, flip = rng.integers(-self.shift, self.shift + 1, (count, 2)), (rng.random(count) < 0.5) & self.flip
        return PairPlan(rows, np.full(count, 2, np.int64), self.size, colours, shift, flip)

    def draw(self, step: int, rank: int, rng: np.random.Generator) -> np.ndarray:
        """Rows of the pairs of a plan, (pairs_per_batch, 2) int64; `rng` is that of (seed, step, rank)."""
        drawn = np.searchsorted(self._chances, rng.random(self.pairs_per_batch), side="right")
        return np.stack([self.pairs[dataset].draw(rng) for dataset in drawn.tolist()])

    def another(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """A random pair of the data set of a row, (2,) int64, in place of one that cannot be read."""
        return self.pairs[self.manifests.dataset_of[self.manifests.sequence_of(row)]].draw(rng)

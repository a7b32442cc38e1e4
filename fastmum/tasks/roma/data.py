"""Pairs as RoMa trains on them: scenes listed by two least overlaps, weighted by their size, shifted and flipped."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import xxhash

from fastmum.config.schema import key
from fastmum.data.manifest import Manifests
from fastmum.data.packing import cumulative
from fastmum.data.pair_plan import ListedPairs, PairPlanner
from fastmum.tasks.pairs import PairDataSection

LISTED = 100_000  # pairs of a list, at most
POWER = 0.75  # a pair of a list of n has the weight n^-POWER
ROUND = 25_000  # pairs that are drawn without replacement
BLOCK = 10_000  # pairs in which every data set has its share
ROUND_SEED, BLOCK_SEED = 2, 3


@dataclass
class RomaDataSection(PairDataSection):
    """Pairs of frames with cameras and depth, and their sampling (Parskatt/RoMa's training)."""

    sampling: str = key("overlap", "overlap: pairs by overlap, from depth", choices=("overlap",))
    overlap: list[float] = key(
        [0.01, 1.0], "least and most share of a frame that the other sees", least=0, most=1, length=2
    )
    second_overlap: float = key(0.35, "pairs of at least this overlap are listed a second time", least=0, most=1)
    pairs_per_batch: int = key(8, "pairs that a device computes at once", least=1)
    image_size: int = key(560, "side of a frame in pixels; the aspect ratio is not kept", least=16)
    jitter: bool = key(False, "random colours")
    shift: int = key(32, "largest shift of both images of a pair, pixels along either axis", least=0)
    flip: bool = key(True, "mirror both images of every second pair")

    def check(self, patch_size: int) -> None:
        super().check(patch_size)
        self.refuse((("image_size", self.image_size, self.image_size % 8 == 0, "a multiple of 8"),))


class RomaPlanner(PairPlanner):
    """Rounds of pairs without replacement: each scene is a list of pairs, and of those of a larger overlap another one.

    Several data sets have rounds of their own, and shares of all pairs by their weights.

    Arguments and errors as of `PairPlanner`, and `second_overlap` of `RomaDataSection`.
    """

    def __init__(
        self, manifests: Manifests, weights: Mapping[str, float] | None = None, *args: Any, second_overlap: float,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(manifests, weights, *args, **options)
        scenes = np.unique(manifests.scene_names(np.arange(manifests.num_sequences)), return_inverse=True)[1]
        rng = np.random.default_rng(self.seed)
        self._sets, shares = list[tuple[np.ndarray, np.ndarray]](), list[float]()  # pairs of a data set, their weights
        for name, pairs in zip(manifests.datasets, cast(list[ListedPairs], self.pairs), strict=True):
            share, listed, overlap = (weights or {}).get(name, 1.0), pairs.rows, pairs.overlap
            if not share or not len(pairs):
                continue
            rows, chances = list[np.ndarray](), list[np.ndarray]()
            scene_of = scenes[manifests.sequence_of(listed[:, 0])]
            order = np.argsort(scene_of, kind="stable")
            for scene in np.split(order, np.flatnonzero(np.diff(scene_of[order])) + 1):
                for some in (scene, scene[overlap[scene] >= second_overlap]):
                    some = some if len(some) <= LISTED else rng.choice(some, LISTED, replace=False)
                    rows.append(listed[some])
                    chances.append(np.full(len(some), max(len(some), 1) ** -POWER))
            self._sets.append((np.concatenate(rows), np.concatenate(chances)))
            self.digests[f"pairs of '{name}'"] = xxhash.xxh3_64_hexdigest(self._sets[-1][0].tobytes())
            shares.append(share)
        bounds = np.round(BLOCK * cumulative(np.array([0.0, *shares]))).astype(np.int64)
        self._quotas = bounds[1:] - bounds[:-1]
        if not self._quotas.all():
            self.notes.append(f"a data set of a share below 1 / {BLOCK} by data.weights is never drawn")
        self._round, self._block = lru_cache(2 * len(shares))(self._draw_round), lru_cache(2)(self._draw_block)

    def _draw_round(self, of: int, number: int) -> np.ndarray:
        """Pairs of a round of a data set in order, without replacement: by exponential times over weights."""
        rows, weights = self._sets[of]
        rng, count = np.random.default_rng((self.seed, ROUND_SEED, number, of)), min(ROUND, len(rows))
        times = rng.standard_exponential(len(rows)) / weights
        first = np.argpartition(times, count - 1)[:count]
        return rows[first[np.argsort(times[first])]]

    def _draw_block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """For each of `BLOCK` pairs the data set, by the weights, and how many pairs of that set come before."""
        of = np.repeat(np.arange(len(self._quotas)), self._quotas)
        of = np.random.default_rng((self.seed, BLOCK_SEED, number)).permutation(of)
        before = np.empty(BLOCK, np.int64)
        for i, quota in enumerate(self._quotas.tolist()):
            before[of == i] = number * quota + np.arange(quota)
        return of, before

    def draw(self, step: int, rank: int, rng: np.random.Generator) -> np.ndarray:
        first = (step * self.world_size + rank) * self.pairs_per_batch
        found = []
        for block, place in (divmod(n, BLOCK) for n in range(first, first + self.pairs_per_batch)):
            of, before = (int(each[place]) for each in self._block(block))
            length = min(ROUND, len(self._sets[of][0]))
            found.append(self._round(of, before // length)[before % length])
        return np.stack([pair[:: rng.choice((1, -1))] for pair in found])

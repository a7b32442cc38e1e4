"""The batch of a step as equal units: exact frames, level cost, dealt to any number of ranks without talking.

Dealing sequences out after they were drawn is bin packing, and may have no exact answer ({19, 19, 19, 19, 20} in two
bins of 48). So it is done the other way round: a step consists of units of equal frames, each drawn exactly full and,
in the mode `balanced`, with bounded cost; ranks take consecutive units. The units of a step depend on the global
batch and not on the ranks, so that 64 ranks of 96 frames and 32 of 192 train on the same sequences, and a rank plans
its own part alone.

The cost is that of attention across the frames of a sequence, sum of S squared. Its mean follows from the shares of
frames; bounding it from above at that mean plus `LEVEL` moves every batch next to it, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fastmum.data.packing import Packing, Totals, fit

PAPER_FRAMES = 96  # of a GPU (supplement)
LEVEL = 0.01  # a unit's cost may exceed the mean by this share, if the shares of frames can then still be met
SHARES_MET = 1e-3  # total variation up to which they are
SHARES_MISSED = 0.02  # and from which larger units are tried


def paper_shares(sizes: np.ndarray, frames: int) -> np.ndarray:
    """(n,) share of frames in sequences of each length when S is uniform and floor(frames / S) sequences are taken."""
    seen = sizes * (frames // sizes)
    return seen / seen.sum()


class Filling(NamedTuple):
    """How a unit is filled.

    Args:
        frames: of the unit.
        totals: frames of its sequences; the others are single images.
        packing: lengths of the sequences; none: single images alone.
        cap: bound of the cost as a multiple of its mean; infinite: not bounded.
        distance: total variation between the expected shares of frames by length and those wanted.
    """

    frames: int
    totals: Totals
    packing: Packing | None = None
    cap: float = np.inf
    distance: float = 0.0

    def shares(self, sizes: np.ndarray) -> np.ndarray:
        """(n,) expected share of each length among the frames of sequences."""
        return self.packing.shares(sizes, self.totals) if self.packing else np.zeros(len(sizes))

    def draw(self, second: bool, rng: np.random.Generator) -> np.ndarray:
        """Lengths of a unit's sequences, (n,) int64, with the first or second of the totals."""
        total = self.totals.frames[second]
        return self.packing.draw(total, rng) if total else np.empty(0, np.int64)


def fill_rank(frames_per_gpu: int, sizes: np.ndarray, single_share: float, level: bool) -> Filling | None:
    """The way to fill a rank's frames exactly: that of its smallest units with the paper's shares of frames.

    Units are divisors of the rank's frames and no smaller than the paper's batch, since one sequence of 24 views costs
    half of a level batch of 96 frames. The shares of frames by length are those of `paper_shares` in a unit.

    Args:
        frames_per_gpu: frames of a rank.
        sizes: (n,) lengths of sequences, ascending, none longer than `frames_per_gpu`.
        single_share: wanted share of single images among all frames.
        level: bound the cost, as tightly as the shares allow.

    Returns:
        None where nothing fills a rank without more single images than wanted.
    """
    best = None
    for frames in _units(frames_per_gpu, sizes):
        for totals in _totals(frames, sizes, single_share):
            if totals.mean == 0:
                return Filling(frames, totals)
            shares = paper_shares(sizes, frames)
            packing = fit(sizes, shares, totals)
            filling = Filling(frames, totals, packing, distance=_distance(packing.shares(sizes, totals), shares))
            if best is None or filling.distance < best.distance - SHARES_MET:
                best = filling
            if best.distance <= SHARES_MISSED:
                return _levelled(best, sizes) if level else best
    return _levelled(best, sizes) if best and level else best


def _units(frames_per_gpu: int, sizes: np.ndarray) -> Iterator[int]:
    least = max(PAPER_FRAMES, sizes.max(initial=1))
    yield from (divisor for divisor in range(least, frames_per_gpu) if frames_per_gpu % divisor == 0)
    yield frames_per_gpu


def _levelled(filling: Filling, sizes: np.ndarray) -> Filling:
    """With the cost bounded as tightly as leaves the shares of frames where they are."""
    frames, totals, shares = filling.frames, filling.totals, paper_shares(sizes, filling.frames)
    mean_cost = frames + totals.mean * float(filling.shares(sizes) @ (sizes - 1))
    excess = LEVEL
    while mean_cost * (1 + excess) < frames * sizes[-1]:
        packing = fit(sizes, shares, totals, budget=int((mean_cost * (1 + excess) - frames) / 2))
        if packing is not None:
            missed = _distance(packing.shares(sizes, totals), shares)
            if missed <= filling.distance + SHARES_MET:
                return filling._replace(packing=packing, cap=1 + excess, distance=missed)
        excess *= 2
    return filling


def _totals(frames: int, sizes: np.ndarray, single_share: float) -> list[Totals]:
    """Totals that the sequences of a unit can have, with the mean that leaves room for the single images wanted.

    First the nearest numbers below and above, so that every unit has its part of single images. Small batches may
    then have no room for long sequences; so second, as the paper does it, all or nothing.
    """
    reachable = np.zeros(frames + 1, bool)
    reachable[0] = True
    for total in range(1, frames + 1):
        reachable[total] = reachable[total - sizes[sizes <= total]].any()
    possible = np.flatnonzero(reachable)
    mean = round((1 - single_share) * frames, 9)
    if possible[-1] < mean:
        return []
    near = int(possible[possible <= mean][-1]), int(possible[possible >= mean][0])
    options = []
    for below, above in dict.fromkeys([near, (0, int(possible[-1]))]):
        chance = (mean - below) / (above - below) if above > below else 0.0
        options.append(Totals((below, above), (1 - chance, chance)))
    return options


def _distance(shares: np.ndarray, wanted: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(shares - wanted).sum() / 2)

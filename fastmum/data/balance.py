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

from typing import NamedTuple

import numpy as np

from fastmum.data.packing import Packing, Totals, distance, fit

PAPER_FRAMES = 96  # of a GPU (supplement)
LEVEL = 0.01  # a unit's cost may exceed the mean by this share, if the shares of frames can then still be met
SHARES_MET = 1e-3  # total variation up to which they are


def unit_frames(frames_per_gpu: int) -> int:
    """Frames of a unit: the least divisor of a rank's frames that is no less than the paper's batch, or all of them.

    Smaller units could not be level: one sequence of 24 views costs half of a level batch of 96 frames.
    """
    divisors = (d for d in range(PAPER_FRAMES, frames_per_gpu) if frames_per_gpu % d == 0)
    return next(divisors, frames_per_gpu)


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

    def draw(self, second: bool, rng: np.random.Generator) -> np.ndarray:
        """Lengths of a unit's sequences, (n,) int64, with the first or second of the totals."""
        total = self.totals.frames[second]
        return self.packing.draw(total, rng) if total else np.empty(0, np.int64)


def fill(frames: int, sizes: np.ndarray, shares: np.ndarray, single_share: float, level: bool) -> Filling | None:
    """The way to fill units exactly, with the wanted shares of frames in single images and in sequences by length.

    Args:
        frames: of a unit.
        sizes: (n,) lengths of sequences, ascending, none longer than `frames`.
        shares: (n,) wanted share of each among the frames of sequences.
        single_share: wanted share of single images among all frames.
        level: bound the cost, as tightly as the shares allow.

    Returns:
        None where nothing fills a unit without more single images than wanted.
    """
    totals = _totals(frames, sizes, single_share)
    if totals is None or totals.mean == 0:
        return totals and Filling(frames, totals)
    mean_cost = frames - totals.mean + totals.mean * float(shares @ sizes)
    excess = LEVEL
    while level and mean_cost * (1 + excess) < frames * sizes[-1]:
        packing = fit(sizes, shares, totals, budget=int((mean_cost * (1 + excess) - frames) / 2))
        if packing is not None and (miss := distance(packing, sizes, shares, totals)) <= SHARES_MET:
            return Filling(frames, totals, packing, 1 + excess, miss)
        excess *= 2
    packing = fit(sizes, shares, totals)
    return Filling(frames, totals, packing, distance=distance(packing, sizes, shares, totals))


def _totals(frames: int, sizes: np.ndarray, single_share: float) -> Totals | None:
    """The totals that sequences can have next to the mean wanted: the nearest above and below, with that mean."""
    reachable = np.zeros(frames + 1, bool)
    reachable[0] = True
    for total in range(1, frames + 1):
        reachable[total] = reachable[total - sizes[sizes <= total]].any()
    possible = np.flatnonzero(reachable)
    mean = round((1 - single_share) * frames, 9)
    if possible[-1] < mean:
        return None
    below = int(possible[possible <= mean][-1])
    above = int(possible[possible >= mean][0])
    chance = (mean - below) / (above - below) if above > below else 0.0
    return Totals((below, above), (1 - chance, chance))

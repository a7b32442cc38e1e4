"""Exactly full batches with the paper's shares of frames by length, and with level cost in mode `balanced`.

A step consists of units of at least 96 frames, each exactly full; a rank takes consecutive units. The units depend only
on the global batch, so that 64 ranks of 96 frames and 32 ranks of 192 train on the same sequences, and a rank plans its
units without communication.

A unit is drawn from a pool, which is simulated once: lengths are drawn by weight, only those that leave a rest that can
be filled, until a batch is full. For `balanced`, batches whose cost of attention (sum of S squared over the sequences)
differs from the mean are rejected. The probabilities of the others are then tilted by a factor per length, so that the
expected shares of frames by length are the wanted ones.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

PAPER_FRAMES = 96  # per GPU (supplement)
POOL = 4096  # batches in a pool, at most
TRIALS = 16  # simulated per batch of a pool with level cost; 4 % of the batches of 96 frames are level
LEVEL = 0.01  # the cost may differ from its mean by this share; doubled until the shares of frames can be met
SHARES_MET = 2e-3  # total variation that levelling may add
SHARES_MISSED = 0.02  # total variation above which larger units are tried
SCALING_STEPS = 200  # of the calibration: leaves a total variation of 2e-4 for 96 frames


def paper_shares(sizes: np.ndarray, frames: int) -> np.ndarray:
    """(n,) share of frames in sequences of each length S if S is uniform and a batch has floor(frames / S) of them."""
    seen = sizes * (frames // sizes)
    return seen / seen.sum()


class Filling(NamedTuple):
    """How units are filled. Column 0 stands for single images, the others for the n lengths of sequences, ascending."""

    frames: int  # of a unit
    sizes: np.ndarray  # (1 + n,) frames of one image or sequence
    counts: np.ndarray  # (batches, 1 + n) numbers of each in the batches of the pool
    cumulative: np.ndarray  # (batches,) cumulative probabilities of the batches
    shares: np.ndarray  # (1 + n,) expected shares of frames
    distance: float  # total variation between `shares` and the wanted ones

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Lengths of a unit's sequences (k,) int64, and the number of single images."""
        counts = self.counts[np.searchsorted(self.cumulative, rng.random(), side="right")]
        return np.repeat(self.sizes[1:], counts[1:]), int(counts[0])


@lru_cache(maxsize=64)
def fill_rank(frames_per_gpu: int, lengths: tuple[int, ...], single_share: float, level: bool) -> Filling | None:
    """Fill a rank's frames exactly, with the smallest units that have the paper's shares of frames.

    Units divide the rank's frames and are no smaller than the paper's batch, because one sequence of 24 views has half
    the cost of a level batch of 96 frames. The result depends only on the arguments; it is None if a rank cannot be
    filled without more single images than wanted.

    Args:
        lengths: of sequences, ascending, none longer than `frames_per_gpu`.
        single_share: wanted share of single images among all frames.
        level: reject batches whose cost differs from the mean, as strictly as the shares allow.
    """
    least = max((PAPER_FRAMES, *lengths))
    smallest = next((n for n in range(least, frames_per_gpu) if frames_per_gpu % n == 0), frames_per_gpu)
    sizes, fillings = np.array([1, *lengths]), list[Filling]()
    for frames in dict.fromkeys([smallest, frames_per_gpu]):
        wanted = np.array([single_share, *(1 - single_share) * paper_shares(sizes[1:], frames)])
        for totals in _totals(frames, sizes[1:], single_share):
            fillings.append(_fill(frames, sizes, wanted, totals, level))
            if fillings[-1].distance <= SHARES_MISSED:
                return fillings[-1]
    return min(fillings, key=lambda filling: filling.distance, default=None)


def _fillable(frames: int, lengths: np.ndarray) -> np.ndarray:
    """(frames + 1,) bool: numbers of frames that sequences of these lengths can have together."""
    fillable = np.zeros(frames + 1, bool)
    fillable[0] = True
    for total in range(1, frames + 1):
        fillable[total] = fillable[total - lengths[lengths <= total]].any()
    return fillable


def _totals(frames: int, lengths: np.ndarray, single_share: float) -> list[tuple[int, int]]:
    """Pairs of totals of the sequences in a unit, below and above the wanted mean.

    First the nearest, so that every unit has its part of single images. Small batches may then have no room for long
    sequences; so second, as in the paper, all or nothing.
    """
    possible = np.flatnonzero(_fillable(frames, lengths)).tolist()
    mean = round((1 - single_share) * frames, 9)
    if possible[-1] < mean:
        return []
    return [(max(t for t in possible if t <= mean), min(t for t in possible if t >= mean)), (0, possible[-1])]


def _fill(frames: int, sizes: np.ndarray, wanted: np.ndarray, totals: tuple[int, int], level: bool) -> Filling:
    trials = max(POOL, POOL * TRIALS * PAPER_FRAMES // max(frames, PAPER_FRAMES)) if level else POOL
    batches = _simulate(frames, sizes, wanted, totals, trials)
    filling = _calibrate(frames, sizes, batches[:POOL], wanted)
    cost, mean_cost = batches @ sizes**2, frames * (filling.shares @ sizes)
    allowed = LEVEL
    while level and allowed < 1:
        kept = batches[abs(cost / mean_cost - 1) <= allowed][:POOL]
        if set(kept[:, 0]) == set(batches[:, 0]):  # else the share of single images would change
            levelled = _calibrate(frames, sizes, kept, wanted)
            if levelled.distance <= filling.distance + SHARES_MET:
                return levelled
        allowed *= 2
    return filling


def _simulate(frames: int, sizes: np.ndarray, wanted: np.ndarray, totals: tuple[int, int], trials: int) -> np.ndarray:
    """(trials, 1 + n) random batches whose sequences have one of two totals."""
    below, above = totals
    lengths, sums = sizes[1:], np.arange(above + 1)[:, None]
    allowed = (sums >= lengths) & _fillable(above, lengths)[(sums - lengths).clip(0)]
    chances = np.where(allowed, wanted[1:] / lengths, 0).cumsum(axis=1)
    # One sorted array for a search in all rows at once: row `sum` lies between sum and sum + 1.
    table = (sums + chances / chances[:, -1:].clip(1e-300)).ravel()
    rng = np.random.default_rng(0)
    share_above = ((1 - wanted[0]) * frames - below) / max(above - below, 1)
    rest = np.where(np.diff(np.floor(share_above * np.arange(trials + 1))) > 0, above, below)
    batches = np.zeros((trials, len(sizes)), np.int64)
    batches[:, 0] = frames - rest
    while len(open_ := np.flatnonzero(rest)):
        left = rest[open_]
        drawn = np.searchsorted(table, left + rng.random(len(left)), side="right") - left * len(lengths)
        batches[open_, drawn + 1] += 1
        rest[open_] -= lengths[drawn]
    return batches


def _calibrate(frames: int, sizes: np.ndarray, batches: np.ndarray, wanted: np.ndarray) -> Filling:
    """Choose probabilities of the batches (P, 1 + n) so that the expected shares of frames are the wanted ones.

    Generalised iterative scaling (Darroch and Ratcliff, 1972): probabilities are proportional to exp(shares @ x), where
    shares (P, 1 + n) are those of each batch, and x grows by log(wanted / expected). The share of single images is
    exact at each step, because batches with fewer and with more of them are normalised separately.
    """
    shares = batches * (sizes / frames)
    few, many = batches[:, 0].min(), batches[:, 0].max()
    share_many = (wanted[0] * frames - few) / max(many - few, 1)
    groups = [(batches[:, 0] == many, share_many), (batches[:, 0] == few, 1 - share_many)] if few < many else [(..., 1)]
    occurs = shares[:, 1:].any(axis=0)  # other lengths fit in no batch
    target = np.where(occurs, wanted[1:], 0) / max(wanted[1:][occurs].sum(), 1e-300) * (1 - wanted[0])
    x, p = np.zeros(len(sizes)), np.empty(len(batches))
    for _ in range(SCALING_STEPS):
        logits = shares @ x
        for group, chance in groups:
            p[group] = np.exp(logits[group] - logits[group].max())
            p[group] *= chance / p[group].sum()
        expected = p @ shares
        x[1:][occurs] += np.log(target[occurs] / expected[1:][occurs])
    return Filling(frames, sizes, batches, cumulative(p), expected, float(np.abs(expected - wanted).sum() / 2))


def cumulative(chances: np.ndarray) -> np.ndarray:
    """Cumulative probabilities that end in exactly 1, so that a uniform number in [0, 1) stays within the last one."""
    total = chances.cumsum(axis=-1)
    return total / total[..., -1:]

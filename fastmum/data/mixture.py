"""Which data set, which of its sequences, which of their frames.

Data sets are drawn by weight, a sequence uniformly among those of its data set with enough frames, and its frames
without replacement (supplement, "Sampling"). Sequences are kept as one array of numbers, by data set and within it
longest first, so that the eligible ones are always the first so many.
"""

from __future__ import annotations

import numpy as np

SINKHORN_STEPS = 2000
SINKHORN_TOLERANCE = 1e-9


class Mixture:
    """Sequences by data set and length.

    Args:
        starts: (n + 1,) first row of every sequence, and the end.
        dataset_of: (n,) data set of every sequence.
        num_datasets: how many there are.
        longest: sequences with more frames are as good as ones with this many.
        keep: (n,) bool, sequences to draw from; none: all.
    """

    def __init__(
        self,
        starts: np.ndarray,
        dataset_of: np.ndarray,
        num_datasets: int,
        longest: int,
        keep: np.ndarray | None = None,
    ) -> None:
        self.starts = starts
        levels = longest + 1
        key = np.asarray(dataset_of).astype(np.int32) * levels + (longest - np.minimum(np.diff(starts), longest))
        if keep is not None:
            key = np.where(keep, key, num_datasets * levels)
        if num_datasets * levels < 2**15:
            key = key.astype(np.int16)  # sorted by radix, six times as fast
        counts = np.bincount(key, minlength=num_datasets * levels)[: num_datasets * levels].reshape(num_datasets, levels)
        self._order = np.argsort(key, kind="stable")[: counts.sum()].astype(np.int32)
        # (data sets, longest + 1): sequences with at least so many frames
        self.eligible = counts.cumsum(axis=1)[:, ::-1]
        self._first = np.concatenate([[0], counts.sum(axis=1).cumsum()[:-1]])

    @property
    def single(self) -> np.ndarray:
        """(data sets,) bool: all of its sequences are single images."""
        return (self.eligible[:, 1] > 0) & (self.eligible[:, 2] == 0)

    def sequences(self, datasets: np.ndarray, lengths: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """(n,) numbers of sequences of at least these lengths, one of each data set, from uniform numbers in [0, 1)."""
        place = (uniform * self.eligible[datasets, lengths]).astype(np.int64)
        return self._order[self._first[datasets] + place]

    def rows(self, sequences: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(sum of lengths,) rows of frames, drawn without replacement within each sequence, in random order."""
        begins, ends = self.starts[sequences], self.starts[sequences + 1]
        drawn = [
            begin + rng.choice(end - begin, size=length, replace=False)
            for begin, end, length in zip(begins.tolist(), ends.tolist(), lengths.tolist(), strict=True)
        ]
        return np.concatenate(drawn) if drawn else np.empty(0, np.int64)


def by_weight(weights: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """(lengths, data sets) probabilities of the data sets for each length: the weights of those that have it."""
    table = np.where(eligible, weights, 0.0)
    return table / table.sum(axis=1, keepdims=True)


def by_frames(weights: np.ndarray, eligible: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(lengths, data sets) probabilities for which every data set has its weight of the frames.

    A data set of short sequences cannot take part in long ones, so it is drawn more often for the short ones: the
    table nearest to `by_weight` (Sinkhorn) whose margins are the shares of the lengths and the weights of the data
    sets. Where there is no such table the shares of the lengths are kept, and the weights met as nearly as can be.

    Args:
        weights: (data sets,) wanted share of frames of each, summing to 1.
        eligible: (lengths, data sets) bool: it has sequences so long; at least one in every row.
        shares: (lengths,) share of frames in sequences of each length, summing to 1.
    """
    table = by_weight(weights, eligible)
    for _ in range(SINKHORN_STEPS):
        got = shares @ table
        if np.abs(got - weights).max() < SINKHORN_TOLERANCE:
            break
        table *= weights / np.where(got > 0, got, 1.0)
        table /= table.sum(axis=1, keepdims=True)
    return table

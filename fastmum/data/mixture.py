"""Draws data sets by weight, sequences uniformly among those with enough frames (supplement, "Sampling")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fastmum.data.errors import DataError

SINKHORN_STEPS = 2000
SINKHORN_TOLERANCE = 1e-9
WEIGHT_MISSED = 0.01  # relative; `notes` report a data set whose share of frames differs more from its weight


class SequenceIndex:
    """Sequences sorted by data set and length, longest first, so that the eligible ones of a data set are a prefix.

    Args:
        starts: (n + 1,) first row of each sequence, and the end.
        dataset_of: (n,) data set of each sequence.
        num_datasets: number of data sets.
        longest: lengths above this count as this.
        keep: (n,) bool, sequences to draw from; None: all.

    Attributes:
        eligible: (num_datasets, longest + 1) number of sequences with at least so many frames.
    """

    def __init__(
        self,
        starts: np.ndarray,
        dataset_of: np.ndarray,
        num_datasets: int,
        longest: int,
        keep: np.ndarray | None = None,
    ) -> None:
        self._starts = starts
        keys, levels = num_datasets * (longest + 1), longest + 1
        key = np.asarray(dataset_of).astype(np.int32) * levels + (longest - np.minimum(np.diff(starts), longest))
        if keep is not None:
            key = np.where(keep, key, keys)
        if keys < 2**15:
            key = key.astype(np.int16)  # radix sort
        counts = np.bincount(key, minlength=keys)[:keys].reshape(num_datasets, levels)
        self._order = np.argsort(key, kind="stable")[: counts.sum()].astype(np.int32)
        self._first = np.concatenate([[0], counts.sum(axis=1).cumsum()[:-1]])
        self.eligible = counts.cumsum(axis=1)[:, ::-1]

    def sequences(self, datasets: np.ndarray, lengths: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """(n,) sequences of these data sets with at least these lengths, chosen by uniform numbers in [0, 1)."""
        place = (uniform * self.eligible[datasets, lengths]).astype(np.int64)
        return self._order[self._first[datasets] + place]

    def rows(self, sequences: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(sum of lengths,) rows of frames, drawn without replacement within each sequence, in random order."""
        begins, ends = self._starts[sequences], self._starts[sequences + 1]
        drawn = [
            begin + rng.choice(end - begin, size=length, replace=False)
            for begin, end, length in zip(begins.tolist(), ends.tolist(), lengths.tolist(), strict=True)
        ]
        return np.concatenate(drawn)


class Mixture:
    """Data sets of sequences and of single images, and how often each is drawn.

    Args:
        index: their sequences.
        names: of the data sets.
        weights: by name, default 1; 0 excludes a data set.
        least: fewest views of a sequence.

    Attributes:
        singles, multiple: (k,) data sets of single images, all of whose sequences have one frame; the other data sets
            that have a sequence of at least `least` frames.
        notes: one line per data set that is not drawn according to its weight.

    Raises:
        DataError: invalid weights, an unknown name, nothing to draw from.
    """

    def __init__(
        self, index: SequenceIndex, names: Sequence[str], weights: Mapping[str, float] | None, least: int
    ) -> None:
        self.index = index
        self.notes: list[str] = []
        self._names = names
        weights = weights or {}
        for name, weight in weights.items():
            if name not in names:
                raise DataError(f"data.weights names '{name}', but the data sets are {', '.join(names)}")
            if not 0 <= weight < np.inf:
                raise DataError(f"data.weights.{name} is {weight}, but must be a finite number of at least 0")
        given = np.array([weights.get(name, 1.0) for name in names])
        if not given.any():
            raise DataError("data.weights is 0 for every data set, so there is nothing to draw from; raise one of them")
        used = (given > 0) & (index.eligible[:, 1] > 0)
        single, long_enough = used & (index.eligible[:, 2] == 0), index.eligible[:, least] > 0
        for i in np.flatnonzero(used & ~single & ~long_enough).tolist():
            self.notes.append(f"data set '{names[i]}' is never drawn: no sequence of {least} frames (data.views)")
        self.singles, self.multiple = np.flatnonzero(single), np.flatnonzero(used & ~single & long_enough)
        if not len(self.singles) + len(self.multiple):
            raise DataError(f"there is no sequence of at least {least} frames (data.views) to draw from")
        self._single_weights = given[self.singles] / given[self.singles].sum()
        self._weights = given[self.multiple] / given[self.multiple].sum()

    def settle(self, sizes: np.ndarray, shares: np.ndarray, level: bool, drawn: bool = True) -> np.ndarray:
        """Compute how often each data set is drawn for each length.

        Args:
            sizes: (n,) lengths that occur, ascending.
            shares: (n,) expected share of each length among the frames of sequences.
            level: give every data set its weight of the frames (`by_frames`), not of the draws (`by_weight`).
            drawn: whether sequences are drawn at all; if not, `notes` do not report missed weights.

        Returns:
            (multiple,) expected share of each data set among the frames of sequences.
        """
        eligible = self.index.eligible[self.multiple][:, sizes].T > 0
        table = by_frames(self._weights, eligible, shares) if level else by_weight(self._weights, eligible)
        self._sizes, self._chances, self._single_chances = sizes, cumulative(table), cumulative(self._single_weights)
        got = shares @ table
        for i, share, weight in zip(self.multiple.tolist(), got, self._weights, strict=True):
            if drawn and len(sizes) and abs(share - weight) > WEIGHT_MISSED * weight:
                self.notes.append(
                    f"data set '{self._names[i]}' gets {share:.1%} of the frames of sequences and not {weight:.1%} as "
                    "its weight says: many of its sequences are short"
                )
        return got

    def dataset_shares(self, single_share: float, shares: np.ndarray) -> dict[str, float]:
        """Expected share of all frames of each data set by name; `shares` is the result of `settle`."""
        named = np.zeros(len(self._names))
        named[self.multiple] = (1 - single_share) * shares
        named[self.singles] = single_share * self._single_weights
        return dict(zip(self._names, named.tolist(), strict=True))

    def draw(self, lengths: np.ndarray, num_singles: int, rng: np.random.Generator) -> np.ndarray:
        """(n,) sequences of at least these lengths (n,), the last `num_singles` of them single images."""
        split = len(lengths) - num_singles
        dataset, sequence = rng.random((2, len(lengths)))
        chances = self._chances[np.searchsorted(self._sizes, lengths[:split])]
        multiple = self.multiple[(chances <= dataset[:split, None]).sum(axis=1)]
        singles = self.singles[(self._single_chances <= dataset[split:, None]).sum(axis=1)]
        return self.index.sequences(np.concatenate([multiple, singles]), lengths, sequence)


def by_weight(weights: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """(lengths, data sets) probabilities of the data sets for each length: the weights of the eligible ones."""
    table = np.where(eligible, weights, 0.0)
    return table / table.sum(axis=1, keepdims=True)


def by_frames(weights: np.ndarray, eligible: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(lengths, data sets) probabilities that give every data set its weight of the frames.

    A data set of short sequences has no long ones, so it is drawn more often for short lengths: Sinkhorn's iteration
    finds the nearest such table to `by_weight`. If none exists, the shares of the lengths are exact and the weights
    approximate.

    Args:
        weights: (data sets,) wanted share of frames of each, summing to 1.
        eligible: (lengths, data sets) bool: it has sequences of this length; at least one in every row.
        shares: (lengths,) share of frames in sequences of each length, summing to 1.
    """
    table = by_weight(weights, eligible)
    for _ in range(SINKHORN_STEPS):
        got = shares @ table
        if np.abs(got - weights).max(initial=0) < SINKHORN_TOLERANCE:
            break
        table *= weights / np.where(got > 0, got, 1.0)
        table /= table.sum(axis=1, keepdims=True)
    return table


def cumulative(chances: np.ndarray) -> np.ndarray:
    """Cumulative probabilities that end in exactly 1, so that a uniform number in [0, 1) stays within the last one."""
    total = chances.cumsum(axis=-1)
    return total / total[..., -1:]

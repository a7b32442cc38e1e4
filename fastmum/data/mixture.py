"""Which data set, which of its sequences, which of their frames.

Data sets are drawn by weight, a sequence uniformly among those of its data set with enough frames, and its frames
without replacement (supplement, "Sampling").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fastmum.data.errors import DataError

SINKHORN_STEPS = 2000
SINKHORN_TOLERANCE = 1e-9
WEIGHT_MISSED = 0.01  # relative; a data set whose share of frames is further from its weight is told in `notes`


class SequenceIndex:
    """Sequences by data set, within it longest first: those with enough frames are always the first so many.

    Args:
        starts: (n + 1,) first row of every sequence, and the end.
        dataset_of: (n,) data set of every sequence.
        num_datasets: how many there are.
        longest: sequences with more frames are as good as ones with this many.
        keep: (n,) bool, sequences to draw from; none: all.

    Attributes:
        eligible: (data sets, longest + 1) number of sequences with at least so many frames.
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
            key = key.astype(np.int16)  # NumPy sorts these by radix
        counts = np.bincount(key, minlength=keys)[:keys].reshape(num_datasets, levels)
        self._order = np.argsort(key, kind="stable")[: counts.sum()].astype(np.int32)
        self._first = np.concatenate([[0], counts.sum(axis=1).cumsum()[:-1]])
        self.eligible = counts.cumsum(axis=1)[:, ::-1]

    def sequences(self, datasets: np.ndarray, lengths: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """(n,) numbers of sequences of at least these lengths, one of each data set, from uniform numbers in [0, 1)."""
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
        weights: by name, 1 for those not named; 0 leaves a data set out.
        least: fewest views of a sequence.

    Attributes:
        singles, multiple: numbers of the data sets of single images, all of whose sequences are one frame, and of the
            others that have a sequence of at least `least` frames.
        notes: one line each on data sets that are not drawn as their weight asks for.

    Raises:
        DataError: weights that are not, an unknown name, nothing to draw from.
    """

    def __init__(
        self, index: SequenceIndex, names: Sequence[str], weights: Mapping[str, float] | None, least: int
    ) -> None:
        self.index = index
        self.notes: list[str] = []
        self._names = names
        given = _by_name(names, weights)
        if not given.any():
            raise DataError("data.weights is 0 for every data set, so there is nothing to draw from; raise one of them")
        used = (given > 0) & (index.eligible[:, 1] > 0)
        single = used & (index.eligible[:, 2] == 0)
        long_enough = index.eligible[:, least] > 0
        for i in np.flatnonzero(used & ~single & ~long_enough):
            self.notes.append(f"data set '{names[i]}' is never drawn: no sequence of {least} frames (data.views)")
        self.singles, self.multiple = np.flatnonzero(single), np.flatnonzero(used & ~single & long_enough)
        if not len(self.singles) + len(self.multiple):
            raise DataError(f"there is no sequence of at least {least} frames (data.views) to draw from")
        self._single_weights = given[self.singles] / given[self.singles].sum() if len(self.singles) else np.empty(0)
        self._weights = given[self.multiple] / given[self.multiple].sum() if len(self.multiple) else np.empty(0)

    def settle(self, sizes: np.ndarray, shares: np.ndarray, level: bool, drawn: bool = True) -> np.ndarray:
        """Fix how often each data set is drawn for each length.

        Args:
            sizes: (n,) lengths that occur, ascending.
            shares: (n,) expected share of each among the frames of sequences.
            level: give every data set its weight of the frames (`by_frames`), not of the draws (`by_weight`).
            drawn: whether sequences are drawn at all; a share of none is not told.

        Returns:
            (multiple,) expected share of each data set among the frames of sequences.
        """
        eligible = self.index.eligible[self.multiple][:, sizes].T > 0
        table = by_frames(self._weights, eligible, shares) if level else by_weight(self._weights, eligible)
        self._sizes, self._chances, self._single_chances = sizes, _cumulative(table), _cumulative(self._single_weights)
        got = shares @ table
        for i, share, weight in zip(self.multiple, got, self._weights, strict=True):
            if drawn and len(sizes) and abs(share - weight) > WEIGHT_MISSED * weight:
                self.notes.append(f"data set '{self._names[i]}' gets {share:.1%} of the frames of sequences and not "
                                  f"{weight:.1%} as its weight says: many of its sequences are short")  # fmt: skip
        return got

    def dataset_shares(self, single_share: float, shares: np.ndarray) -> dict[str, float]:
        """Expected share of all frames of each data set by name, from those that `settle` returned."""
        named = dict.fromkeys(self._names, 0.0)
        for i, share in zip(self.multiple, shares, strict=True):
            named[self._names[i]] = float((1 - single_share) * share)
        for i, share in zip(self.singles, self._single_weights, strict=True):
            named[self._names[i]] = float(single_share * share)
        return named

    def draw(self, lengths: np.ndarray, num_singles: int, rng: np.random.Generator) -> np.ndarray:
        """(n,) sequences of at least these lengths (n,), the last `num_singles` of them single images."""
        split = len(lengths) - num_singles
        dataset, sequence = rng.random((2, len(lengths)))
        chances = self._chances[np.searchsorted(self._sizes, lengths[:split])]
        multiple = self.multiple[(chances <= dataset[:split, None]).sum(axis=1)]
        singles = self.singles[(self._single_chances <= dataset[split:, None]).sum(axis=1)]
        return self.index.sequences(np.concatenate([multiple, singles]), lengths, sequence)


def by_weight(weights: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """(lengths, data sets) probabilities of the data sets for each length: the weights of those that have it."""
    table = np.where(eligible, weights, 0.0)
    return table / table.sum(axis=1, keepdims=True)


def by_frames(weights: np.ndarray, eligible: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(lengths, data sets) probabilities for which every data set has its weight of the frames.

    A data set of short sequences cannot take part in long ones, so it is drawn more often for the short ones: this is
    the table nearest to `by_weight` (Sinkhorn's iteration) with which the data sets have their weights. Where there is
    none, the shares of the lengths stand and the weights are met as nearly as the iteration gets.

    Args:
        weights: (data sets,) wanted share of frames of each, summing to 1.
        eligible: (lengths, data sets) bool: it has sequences so long; at least one in every row.
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


def _cumulative(chances: np.ndarray) -> np.ndarray:
    """Cumulative probabilities that end in 1 exactly, so that no uniform number passes the last that is possible."""
    total = chances.cumsum(axis=-1)
    return total / total[..., -1:]


def _by_name(names: Sequence[str], weights: Mapping[str, float] | None) -> np.ndarray:
    """(data sets,) weights as given, 1 by default."""
    weights = weights or {}
    for name, weight in weights.items():
        if name not in names:
            raise DataError(f"data.weights names '{name}', but the data sets are {', '.join(names)}")
        if not 0 <= weight < np.inf:
            raise DataError(f"data.weights.{name} is {weight}, but must be a number of at least 0")
    return np.array([weights.get(name, 1.0) for name in names])

"""Draws data sets by weight, sequences uniformly among those with enough frames (supplement, "Sampling")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastmum.data.errors import DataError

SINKHORN_STEPS = 2000
SINKHORN_TOLERANCE = 1e-9
WEIGHT_MISSED = 0.01  # relative; `notes` report a data set whose share of frames differs more from its weight


class Mixture:
    """Data sets of sequences and of single images, and how often each is drawn.

    Args:
        manifests: `Manifests`, or a `plan.Catalogue`.
        weights: of data sets by name, default 1; 0 excludes a data set.
        views: fewest and most frames of a sequence.
        keep: (n,) bool, sequences to draw from; None: all.

    Attributes:
        singles, multiple: (k,) data sets of single images, all of whose sequences have one frame; the other data sets
            that have a sequence of at least `views[0]` frames.
        eligible: (data sets, views[1] + 1) number of sequences with at least so many frames.
        notes: one line per data set that is not drawn according to its weight.

    Raises:
        DataError: invalid weights, an unknown name, nothing to draw from.
    """

    def __init__(
        self,
        manifests: Any,
        weights: Mapping[str, float] | None,
        views: tuple[int, int],
        keep: np.ndarray | None = None,
    ) -> None:
        self._names, self._starts = manifests.datasets, manifests.starts
        self.notes: list[str] = []
        self._sort_sequences(manifests.dataset_of, max(views[1], 2), keep)
        weights = weights or {}
        for name, weight in weights.items():
            if name not in self._names:
                raise DataError(f"data.weights names '{name}', but the data sets are {', '.join(self._names)}")
            if not 0 <= weight < np.inf:
                raise DataError(f"data.weights.{name} is {weight}, but must be a finite number of at least 0")
        given = np.array([weights.get(name, 1.0) for name in self._names])
        if not given.any():
            raise DataError("data.weights is 0 for every data set, so there is nothing to draw from; raise one of them")
        used = (given > 0) & (self.eligible[:, 1] > 0)
        single, long_enough = used & (self.eligible[:, 2] == 0), self.eligible[:, views[0]] > 0
        for i in np.flatnonzero(used & ~single & ~long_enough).tolist():
            self.notes.append(
                f"data set '{self._names[i]}' is never drawn: no sequence of {views[0]} frames (data.views)"
            )
        self.singles, self.multiple = np.flatnonzero(single), np.flatnonzero(used & ~single & long_enough)
        if not len(self.singles) + len(self.multiple):
            raise DataError(f"there is no sequence of at least {views[0]} frames (data.views) to draw from")
        self._single_chances = cumulative(given[self.singles])
        self._weights = given[self.multiple] / given[self.multiple].sum()

    def _sort_sequences(self, dataset_of: np.ndarray, longest: int, keep: np.ndarray | None) -> None:
        """Sort by data set and length, longest first, so that the eligible sequences of a data set are a prefix."""
        sets, levels = len(self._names), longest + 1  # lengths above `longest` count as this
        key = np.asarray(dataset_of).astype(np.int32) * levels + (longest - np.minimum(np.diff(self._starts), longest))
        if keep is not None:
            key = np.where(keep, key, sets * levels)
        if sets * levels < 2**15:
            key = key.astype(np.int16)  # radix sort
        counts = np.bincount(key, minlength=sets * levels)[: sets * levels].reshape(sets, levels)
        self._order = np.argsort(key, kind="stable")[: counts.sum()].astype(np.int32)
        self._first = np.concatenate([[0], counts.sum(axis=1).cumsum()[:-1]])
        self.eligible = counts.cumsum(axis=1)[:, ::-1]

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
        eligible = self.eligible[self.multiple][:, sizes].T > 0
        table = by_frames(self._weights, eligible, shares) if level else by_weight(self._weights, eligible)
        self._sizes, self._chances = sizes, cumulative(table)
        got = shares @ table
        for i, share, weight in zip(self.multiple.tolist(), got, self._weights, strict=True):
            if drawn and len(sizes) and abs(share - weight) > WEIGHT_MISSED * weight:
                self.notes.append(
                    f"data set '{self._names[i]}' gets {share:.1%} of the frames of sequences and not {weight:.1%} as "
                    "its weight says: many of its sequences are short"
                )
        return got

    def draw(self, lengths: np.ndarray, num_singles: int, rng: np.random.Generator) -> np.ndarray:
        """Rows of frames (sum of lengths,) of sequences of these lengths (n,), the last `num_singles` single images.

        Frames are drawn without replacement within each sequence, in random order.
        """
        split = len(lengths) - num_singles
        dataset, uniform = rng.random((2, len(lengths)))
        chances = self._chances[np.searchsorted(self._sizes, lengths[:split])]
        multiple = self.multiple[(chances <= dataset[:split, None]).sum(axis=1)]
        singles = self.singles[(self._single_chances <= dataset[split:, None]).sum(axis=1)]
        sequences = self.sequences(np.concatenate([multiple, singles]), lengths, uniform)
        begins, ends = self._starts[sequences], self._starts[sequences + 1]
        rows = [
            begin + rng.choice(end - begin, size=length, replace=False)
            for begin, end, length in zip(begins.tolist(), ends.tolist(), lengths.tolist(), strict=True)
        ]
        return np.concatenate(rows)

    def sequences(self, datasets: np.ndarray, lengths: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """(n,) sequences of these data sets with at least these lengths, chosen by uniform numbers in [0, 1)."""
        place = (uniform * self.eligible[datasets, lengths]).astype(np.int64)
        return self._order[self._first[datasets] + place]


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

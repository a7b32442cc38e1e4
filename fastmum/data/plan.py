"""Sampling plans: which frames a step trains on, in which sequences, with which crops and flips.

A plan is a pure function of (seed, step, rank, world size), so a run resumes from a step number, ranks need no
communication, and every decoder gets the same batch.

Modes:
    paper: with probability `imagenet_share` a batch of single images; otherwise one number of views S, uniform, and
        floor(frames / S) sequences (supplement, "Sampling"). Independent on every rank.
    packed: exactly full batches of sequences of mixed lengths, with the paper's share of frames by length (`packing`);
        single images are `imagenet_share` of the frames.
    balanced: packed, and the cost of attention is equal over ranks and steps to within 1 %.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmum.data.decode.image import draw_crops
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests
from fastmum.data.packing import PAPER_FRAMES, SHARES_MISSED, cumulative, fill_rank, paper_shares

MODES = ("packed", "balanced", "paper")
SINKHORN_STEPS = 2000
SINKHORN_TOLERANCE = 1e-9
WEIGHT_MISSED = 0.01  # relative; `notes` report a data set whose share of frames differs more from its weight


@dataclass(frozen=True)
class Catalogue:
    """The attributes of `Manifests` that planning reads, for planning without files."""

    datasets: tuple[str, ...]
    starts: np.ndarray
    dataset_of: np.ndarray


class StepPlan(NamedTuple):
    """What one rank decodes for one step, longest sequence first."""

    rows: np.ndarray  # (F,) int64, rows of the manifests, sequence by sequence
    lengths: np.ndarray  # (n,) int64, frames of each sequence; they sum to F
    crops: np.ndarray  # (F, CROP_WIDTH) float32, for `crop_boxes`
    flips: np.ndarray  # (F,) bool, mirror left to right


class StepPlanner:
    """Draws plans.

    Data sets whose sequences all have one frame (ImageNet) are the single images; without them their share is 0, and
    without sequences it is 1. Lengths that no sequence has, or that do not fit in a batch, are omitted, and the shares
    of the others grow. `notes` has one line per deviation from the settings. DataError: settings that cannot be met,
    manifests that cannot be read.

    Args:
        manifests: paths of manifests, or open manifests.
        weights: of data sets by name, default 1. They divide the frames of sequences among multi-view sets, and single
            images among the others; 0 excludes a set.
        frames_per_gpu: frames of a plan; an upper bound in mode `paper`.
        views: fewest and most views of a sequence.
        imagenet_share: share of single images among frames; among batches in mode `paper`.
        crop_scale, crop_aspect: ranges of the random crop's share of the image area, and of width over height.
        flip: probability of a flip.
        exclude, only: sequences never to draw from, and sequences to draw from (None: all).
    """

    def __init__(
        self,
        manifests: Manifests | Catalogue | Sequence[Path | str], weights: Mapping[str, float] | None = None,
        frames_per_gpu: int = PAPER_FRAMES, views: tuple[int, int] = (2, 24), imagenet_share: float = 0.1,
        mode: str = "packed", seed: int = 0, world_size: int = 1, *, crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_aspect: tuple[float, float] = (3 / 4, 4 / 3), flip: float = 0.5,
        exclude: Iterable[int] = (), only: Iterable[int] | None = None,
    ) -> None:  # fmt: skip
        _check(frames_per_gpu, views, imagenet_share, mode, seed, world_size)
        self.manifests: Any = Manifests(manifests) if isinstance(manifests, Sequence) else manifests
        self.frames_per_gpu, self.mode, self.seed, self.world_size = frames_per_gpu, mode, seed, world_size
        self.crop_scale, self.crop_aspect, self.flip = crop_scale, crop_aspect, flip

        keep = np.full(len(self.manifests.starts) - 1, only is None)
        keep[np.array(() if only is None else list(only), np.int64)] = True
        keep[np.array(list(exclude), np.int64)] = False
        self._mixture = Mixture(self.manifests, weights, views, keep)
        self.notes = self._mixture.notes
        self.imagenet_share = self._share_of_singles(imagenet_share)
        self._sizes = self._available_lengths(views)
        shares = paper_shares(self._sizes, frames_per_gpu) if mode == "paper" else self._fill(views)
        self._mixture.settle(self._sizes, shares, level=mode != "paper", drawn=self.imagenet_share < 1)

    def _share_of_singles(self, share: float) -> float:
        if not len(self._mixture.multiple):
            return 1.0
        singles = len(self._mixture.singles)
        if share and not singles:
            self.notes.append(f"there are no single images, so data.imagenet_share is 0 and not {share:g}")
        elif singles and share in (0, 1):
            never = "sequences" if share else "single images"
            self.notes.append(f"{never} are never drawn: data.imagenet_share is {share:g}")
        return share if singles else 0.0

    def _available_lengths(self, views: tuple[int, int]) -> np.ndarray:
        eligible = self._mixture.eligible[self._mixture.multiple].sum(axis=0)
        sizes = views[0] + np.flatnonzero(eligible[views[0] : min(views[1], self.frames_per_gpu) + 1])
        if self.imagenet_share < 1 and not len(sizes):
            least = f"sequences have at least {views[0]} views (data.views)"
            raise DataError(f"data.frames_per_batch is {self.frames_per_gpu}, but {least}")
        if len(sizes) and sizes[-1] < views[1]:
            most = f"sequences have at most {sizes[-1]} views instead of {views[1]} (data.views)"
            self.notes.append(f"{most}: no sequence is longer, or a batch has no room for it")
        return sizes

    def _fill(self, views: tuple[int, int]) -> np.ndarray:
        """Compute how batches are filled exactly; returns the share of each length among the frames of sequences."""
        lengths = tuple(self._sizes.tolist())
        filling = fill_rank(self.frames_per_gpu, lengths, self.imagenet_share, level=self.mode == "balanced")
        frames = f"{self.frames_per_gpu} frames (data.frames_per_batch)"
        if filling is None:
            singles = f"{self.imagenet_share:.0%} single images (data.imagenet_share)"
            failed = f"{views[0]} to {views[1]} views (data.views) cannot fill {frames} exactly with {singles}"
            raise DataError(f"{failed}: change one of them, or use data.mode=paper, which leaves part of a batch empty")
        if filling.distance > SHARES_MISSED:
            missed = f"cannot have the paper's shares of lengths: the total variation is {filling.distance:.2f}"
            self.notes.append(f"full batches of {frames} {missed}")
        self.filling = filling
        return filling.shares[1:] / max(filling.shares[1:].sum(), 1e-300)

    def plan(self, step: int, rank: int = 0) -> StepPlan:
        """The plan of a rank for a step."""
        units = []
        for rng in self._generators(step, rank):
            lengths, singles = self._draw_lengths(rng)
            rows = self._mixture.draw(lengths, singles, rng)
            crops = draw_crops(rng, len(rows), self.crop_scale, self.crop_aspect)
            units.append((rows, lengths, crops, rng.random(len(rows)) < self.flip))
        rows, lengths, crops, flips = (np.concatenate(column) for column in zip(*units, strict=True))
        # Longest first: the slowest work starts first, and sequences of equal length are adjacent.
        order = np.argsort(-np.repeat(lengths, lengths), kind="stable")
        return StepPlan(rows[order], -np.sort(-lengths), crops[order], flips[order])

    def lengths(self, step: int, rank: int = 0) -> np.ndarray:
        """Only the lengths of a plan, in a fraction of the time."""
        drawn = [self._draw_lengths(rng)[0] for rng in self._generators(step, rank)]
        return -np.sort(-np.concatenate(drawn))

    def step_frames(self, step: int) -> int:
        """Frames of a step on all ranks together; varies in mode `paper`."""
        if self.mode != "paper":
            return self.frames_per_gpu * self.world_size
        return sum(int(self.lengths(step, rank).sum()) for rank in range(self.world_size))

    def _generators(self, step: int, rank: int) -> list[np.random.Generator]:
        """One random generator per unit of a rank; consecutive ranks have consecutive units."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not one of {self.world_size}")
        units = 1 if self.mode == "paper" else self.frames_per_gpu // self.filling.frames
        return [np.random.default_rng((self.seed, step, rank * units + unit)) for unit in range(units)]

    def _draw_lengths(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Lengths, single images last, and the number of single images."""
        if self.mode != "paper":
            lengths, singles = self.filling.draw(rng)
        elif rng.random() < self.imagenet_share:
            lengths, singles = np.empty(0, np.int64), self.frames_per_gpu
        else:
            size = rng.choice(self._sizes)
            lengths, singles = np.full(self.frames_per_gpu // size, size), 0
        return np.concatenate([lengths, np.ones(singles, np.int64)]), singles


def _check(frames_per_gpu: int, views: Sequence[int], share: float, mode: str, seed: int, world_size: int) -> None:
    for key, value, valid, allowed in (
        ("data.mode", f"'{mode}'", mode in MODES, f"one of {', '.join(MODES)}"),
        ("data.frames_per_batch", frames_per_gpu, frames_per_gpu >= 1, "at least 1"),
        ("world_size", world_size, world_size >= 1, "at least 1"),
        ("run.seed", seed, seed >= 0, "at least 0"),
        ("data.views", views, len(views) == 2 and 1 <= views[0] <= views[-1], "[fewest, most], 1 <= fewest <= most"),
        ("data.imagenet_share", share, 0 <= share <= 1, "between 0 and 1"),
    ):
        if not valid:
            raise DataError(f"{key} is {value}, but must be {allowed}")


class Mixture:
    """Data sets of sequences and of single images, and how often each is drawn.

    Sequences are uniform among those with enough frames (supplement, "Sampling").

    Arguments are as in `StepPlanner`; `keep` (n,) bool marks the sequences to draw from, None: all.

    Attributes:
        singles, multiple: (k,) data sets of single images, all of whose sequences have one frame; the other data sets
            that have a sequence of at least `views[0]` frames.
        eligible: (data sets, views[1] + 1) number of sequences with at least that many frames.
        notes: one line per data set that is not drawn according to its weight.
    """

    def __init__(
        self, manifests: Any, weights: Mapping[str, float] | None, views: tuple[int, int],
        keep: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self._names, self._starts = manifests.datasets, manifests.starts
        self.notes: list[str] = []
        self._sort_sequences(manifests.dataset_of, max(views[1], 2), keep)
        given = given_weights(self._names, weights or {}, self.notes)
        if not given.any():
            raise DataError("data.weights is 0 for every data set, so there is nothing to draw from; raise one of them")
        used = (given > 0) & (self.eligible[:, 1] > 0)
        single, long_enough = used & (self.eligible[:, 2] == 0), self.eligible[:, views[0]] > 0
        for i in np.flatnonzero(used & ~single & ~long_enough).tolist():
            self.notes.append(f"data set '{self._names[i]}' is never drawn: it has no {views[0]} frames (data.views)")
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
        """Compute how often each data set is drawn for each length; returns its expected share of frames (multiple,).

        `sizes` and `shares` (n,) are the lengths that occur, ascending, and their expected shares of the frames of
        sequences. With `level` a data set gets its weight of the frames (`by_frames`), else of the draws (`by_weight`).
        `notes` report missed weights if sequences are `drawn` at all.
        """
        eligible = self.eligible[self.multiple][:, sizes].T > 0
        table = by_frames(self._weights, eligible, shares) if level else by_weight(self._weights, eligible)
        self._sizes, self._chances = sizes, cumulative(table)
        got = shares @ table
        for i, share, weight in zip(self.multiple.tolist(), got, self._weights, strict=True):
            if drawn and len(sizes) and abs(share - weight) > WEIGHT_MISSED * weight:
                missed = f"gets {share:.1%} of the frames of sequences instead of {weight:.1%}"
                self.notes.append(f"data set '{self._names[i]}' {missed}: many of its sequences are short")
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
        bounds = zip(begins.tolist(), ends.tolist(), lengths.tolist(), strict=True)
        return np.concatenate([begin + rng.choice(end - begin, n, replace=False) for begin, end, n in bounds])

    def sequences(self, datasets: np.ndarray, lengths: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """(n,) sequences of these data sets with at least these lengths, chosen by uniform numbers in [0, 1)."""
        place = (uniform * self.eligible[datasets, lengths]).astype(np.int64)
        return self._order[self._first[datasets] + place]


def given_weights(names: Sequence[str], weights: Mapping[str, float], notes: list[str]) -> np.ndarray:
    """`data.weights` in the order of the data sets, 1 for those not named; DataError: unknown names, invalid weights.

    Names of data sets that are only not among these are added to the notes.
    """
    for name, weight in weights.items():
        if name not in names:
            from fastmum.data.builders import BUILDERS  # which imports this module

            message = f"data.weights names '{name}', but the data sets are {', '.join(names)}"
            if name not in BUILDERS:
                raise DataError(message)
            notes.append(message)  # a configuration for several mixtures
        if not 0 <= weight < np.inf:
            raise DataError(f"data.weights.{name} is {weight}, but must be a finite number of at least 0")
    return np.array([weights.get(name, 1.0) for name in names])


def by_weight(weights: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """(lengths, data sets) probabilities of the data sets for each length: the weights of the eligible ones."""
    table = np.where(eligible, weights, 0.0)
    return table / table.sum(axis=1, keepdims=True)


def by_frames(weights: np.ndarray, eligible: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(lengths, data sets) probabilities that give every data set its weight of the frames.

    A data set of short sequences has no long ones, so it is drawn more often for short lengths: Sinkhorn's iteration
    finds the nearest such table to `by_weight`. If none exists, the shares of the lengths are exact and the weights
    approximate. `weights` (data sets,) and the wanted shares of frames `shares` (lengths,) each sum to 1; every row of
    `eligible` (lengths, data sets) bool has a data set.
    """
    table = by_weight(weights, eligible)
    for _ in range(SINKHORN_STEPS):
        got = shares @ table
        if np.abs(got - weights).max(initial=0) < SINKHORN_TOLERANCE:
            break
        table *= weights / np.where(got > 0, got, 1.0)
        table /= table.sum(axis=1, keepdims=True)
    return table

"""Which frames a step trains on, in which sequences, and how each is cropped and flipped.

A plan is a pure function of (seed, step, rank, world size): resuming a run needs the number of the step and nothing
else, no rank has to hear of another, and whoever decodes the frames, the batch is the same.

Modes:
    paper: with the probability `imagenet_share` a batch of single images; otherwise one number of views S, uniform,
        and floor(frames / S) sequences (supplement, "Sampling"). Independently on every rank.
    packed: exactly full batches of sequences of many lengths, with the share of frames in sequences of S views that the
        paper's sampler has (`packing`), and single images as `imagenet_share` of the frames.
    balanced: packed, and the cost of attention is level over ranks and steps (`balance`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmum.data.balance import PAPER_FRAMES, SHARES_MISSED, fill_rank
from fastmum.data.crops import draw_crops
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests
from fastmum.data.mixture import Mixture, by_frames, by_weight

MODES = ("packed", "balanced", "paper")
WEIGHT_MISSED = 0.01  # of a data set's share of frames, relative: told in `notes`


class StepPlan(NamedTuple):
    """What one rank decodes for one step, longest sequence first.

    Args:
        rows: (F,) int64, frames by their row in the manifests, sequence by sequence.
        lengths: (n,) int64, frames of every sequence; their sum is F.
        crops: (F, CROP_WIDTH) float32, for `crops.crop_boxes`.
        flips: (F,) bool, mirrored left to right.
    """

    rows: np.ndarray
    lengths: np.ndarray
    crops: np.ndarray
    flips: np.ndarray


class StepPlanner:
    """Draws plans.

    Data sets all of whose sequences are one frame (ImageNet) are the single images; without such a set their share is
    0, and with nothing else it is 1. Lengths that no sequence has, or that do not fit in a batch, are left out and the
    shares of the others grow. What a person may want to know of that is in `notes`.

    Args:
        manifests: paths of manifests, or manifests opened.
        weights: of data sets by name, 1 for those not named. Multi-view sets share the frames of sequences by them, sets
            of single images the frames of single images; 0 leaves a set out.
        frames_per_gpu: frames of a plan; in the mode `paper`, the most.
        views: fewest and most views of a sequence.
        imagenet_share: share of single images among frames; in the mode `paper`, among batches.
        mode: one of `MODES`.
        seed: of the run.
        world_size: number of ranks.
        crop_scale, crop_aspect: ranges of the random crop's area (share of the image) and aspect ratio (width over height).
        flip: probability of a flip.
        exclude: numbers of sequences never to draw from (held out).
        only: numbers of the sequences to draw from; none: all.

    Attributes:
        notes: one line each on what differs from what was asked for.
        length_shares: expected share of frames in sequences of each length, by length; 0 stands for single images.
        dataset_shares: expected share of frames of each data set, by name.

    Raises:
        DataError: settings that cannot be met, manifests that cannot be read.
    """

    def __init__(
        self,
        manifests: Manifests | Sequence[Path | str],
        weights: Mapping[str, float] | None = None,
        frames_per_gpu: int = PAPER_FRAMES,
        views: tuple[int, int] = (2, 24),
        imagenet_share: float = 0.1,
        mode: str = "packed",
        seed: int = 0,
        world_size: int = 1,
        *,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_aspect: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        exclude: Iterable[int] | None = None,
        only: Iterable[int] | None = None,
    ) -> None:
        _check(frames_per_gpu, views, imagenet_share, mode, world_size)
        self.manifests = Manifests(manifests) if isinstance(manifests, list | tuple) else manifests
        self.frames_per_gpu = frames_per_gpu
        self.mode = mode
        self.seed = seed
        self.world_size = world_size
        self.crop_scale, self.crop_aspect, self.flip = crop_scale, crop_aspect, flip
        self.notes: list[str] = []

        names = self.manifests.datasets
        keep = _kept(self.manifests.num_sequences, exclude, only)
        longest = max(views[1], 2)
        self._mixture = Mixture(self.manifests.starts, self.manifests.dataset_of, len(names), longest, keep)
        self._choose_datasets(names, weights, views, imagenet_share)
        self._choose_lengths(views)
        self._share_frames(names)

    # What there is to draw from

    def _choose_datasets(
        self, names: Sequence[str], weights: Mapping[str, float] | None, views: tuple[int, int], share: float
    ) -> None:
        """Data sets of sequences and of single images with their weights, and the share of single images."""
        given = _weights(names, weights)
        eligible = self._mixture.eligible
        used = (given > 0) & (eligible[:, 1] > 0)
        single = used & self._mixture.single
        multi = used & ~single & (eligible[:, views[0]] > 0)
        if not (single | multi).any():
            raise DataError(f"there is no sequence of at least {views[0]} frames (data.views) to train on")
        for i in np.flatnonzero(used & ~single & ~multi):
            self.notes.append(f"data set '{names[i]}' has no sequence of {views[0]} frames (data.views) and is never drawn")
        if not single.any() and share > 0:
            self.notes.append(f"there are no single images: data.imagenet_share of {share:g} goes to the sequences")
            share = 0.0
        if not multi.any():
            share = 1.0
        if share == 0 and single.any():
            self.notes.append("single images are never drawn: data.imagenet_share is 0")
        self.imagenet_share = share
        self._single, self._multi = np.flatnonzero(single), np.flatnonzero(multi)
        self._single_weights = given[single] / max(given[single].sum(), 1e-300)
        self._single_chances = np.cumsum(self._single_weights)
        self._multi_weights = given[multi] / max(given[multi].sum(), 1e-300)

    def _choose_lengths(self, views: tuple[int, int]) -> None:
        """Lengths of sequences, and how a batch is filled with them."""
        least, most = views[0], min(views[1], self.frames_per_gpu)
        has = self._mixture.eligible[self._multi].any(axis=0)
        self.sizes = np.array([s for s in range(least, most + 1) if has[s]], dtype=np.int64)
        if self.imagenet_share < 1 and not len(self.sizes):
            raise DataError(
                f"data.frames_per_gpu is {self.frames_per_gpu}, fewer than the fewest views of a sequence, "
                f"{least} (data.views)"
            )
        if len(self.sizes) and self.sizes[-1] < views[1]:
            self.notes.append(f"sequences have at most {self.sizes[-1]} views, not {views[1]} (data.views): "
                              "none is longer, or it would not fit in a batch")  # fmt: skip
        if self.mode == "paper":
            return
        filling = fill_rank(self.frames_per_gpu, self.sizes, self.imagenet_share, level=self.mode == "balanced")
        if filling is None:
            raise DataError(
                f"no sequences of {views[0]} to {views[1]} views (data.views) sum to {self.frames_per_gpu} frames "
                f"(data.frames_per_gpu) with {self.imagenet_share:.0%} single images (data.imagenet_share); "
                "change one of them, or take data.mode=paper, which leaves batches partly empty"
            )
        if filling.distance > SHARES_MISSED:
            self.notes.append(
                f"batches of {self.frames_per_gpu} frames (data.frames_per_gpu) cannot be filled exactly with the "
                f"paper's shares of lengths: total variation {filling.distance:.3f}"
            )
        self.filling = filling

    def _share_frames(self, names: Sequence[str]) -> None:
        """Probabilities of data sets for each length, and the expected shares of frames."""
        single, sizes = self.imagenet_share, self.sizes
        if self.mode == "paper":
            batch = self.frames_per_gpu // sizes * sizes
            full = single * self.frames_per_gpu + (1 - single) * (batch.mean() if len(sizes) else 0)
            single = single * self.frames_per_gpu / full
            shares = batch / max(batch.sum(), 1)
        else:
            shares = np.zeros(len(sizes))
            if (packing := self.filling.packing) is not None:
                shares[np.searchsorted(sizes, packing.sizes)] = packing.shares(self.filling.totals)
        eligible = self._mixture.eligible[self._multi][:, sizes].T > 0
        if self.mode == "paper":
            table = by_weight(self._multi_weights, eligible)
        else:
            table = by_frames(self._multi_weights, eligible, shares)
        self._chances = np.cumsum(table, axis=1)
        self.length_shares = {0: single} | dict(zip(sizes.tolist(), ((1 - single) * shares).tolist(), strict=True))
        got = shares @ table
        self.dataset_shares = dict.fromkeys(names, 0.0)
        for i, share in zip(self._multi, (1 - single) * got, strict=True):
            self.dataset_shares[names[i]] = float(share)
        for i, weight in zip(self._single, self._single_weights, strict=True):
            self.dataset_shares[names[i]] = float(single * weight)
        for i, share, weight in zip(self._multi, got, self._multi_weights, strict=True):
            if abs(share - weight) > WEIGHT_MISSED * weight:
                self.notes.append(f"data set '{names[i]}' gets {share:.1%} of the frames of sequences instead of "
                                  f"{weight:.1%}: too many of its sequences are short")  # fmt: skip

    # Drawing

    def plan(self, step: int, rank: int = 0) -> StepPlan:
        """The plan of a step and rank, the same whenever it is asked for."""
        parts = [self._part(*stream) for stream in self._streams(step, rank)]
        rows, lengths, crops, flips = (np.concatenate(column) for column in zip(*parts, strict=True))
        # Longest first: what takes longest should be started first, and equal lengths are computed in one go.
        order = np.argsort(-np.repeat(lengths, lengths), kind="stable")
        return StepPlan(rows[order], -np.sort(-lengths), crops[order], flips[order])

    def lengths(self, step: int, rank: int = 0) -> np.ndarray:
        """The lengths of a plan alone, in a fraction of the time."""
        drawn = [self._draw_lengths(*stream) for stream in self._streams(step, rank)]
        return -np.sort(-np.concatenate([part for lengths, singles in drawn for part in (lengths, np.ones(singles, int))]))

    def _streams(self, step: int, rank: int) -> Iterator[tuple[np.random.Generator, bool]]:
        """Of every unit of a rank: its random numbers, and whether it takes the greater of the two totals."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not one of {self.world_size}")
        # The ranks of a run share what is drawn from the step's own numbers; units count from 1.
        if self.mode == "paper":
            rng = np.random.default_rng((self.seed, step, rank + 1))
            yield rng, False
            return
        units = self.frames_per_gpu // self.filling.frames
        chance = self.filling.totals.chances[1]
        offset = np.random.default_rng((self.seed, step, 0)).random()
        for unit in range(rank * units, (rank + 1) * units):
            # Systematic sampling: of the units of a step the right number, to within one.
            second = int(offset + (unit + 1) * chance) > int(offset + unit * chance)
            yield np.random.default_rng((self.seed, step, unit + 1)), second

    def _draw_lengths(self, rng: np.random.Generator, second: bool) -> tuple[np.ndarray, int]:
        """Lengths of sequences, and the number of single images."""
        if self.mode != "paper":
            return self.filling.draw(second, rng), self.filling.frames - self.filling.totals.frames[second]
        if rng.random() < self.imagenet_share:
            return np.empty(0, np.int64), self.frames_per_gpu
        size = rng.choice(self.sizes)
        return np.full(self.frames_per_gpu // size, size), 0

    def _part(self, rng: np.random.Generator, second: bool) -> StepPlan:
        lengths, singles = self._draw_lengths(rng, second)
        # (2, n): which data set, which sequence
        uniform = rng.random((2, len(lengths) + singles))
        chances = self._chances[np.searchsorted(self.sizes, lengths)]
        multi = self._multi[(chances[:, :-1] <= uniform[0, : len(lengths), None]).sum(axis=1)]
        single = self._single[np.searchsorted(self._single_chances[:-1], uniform[0, len(lengths) :], side="right")]
        lengths = np.concatenate([lengths, np.ones(singles, np.int64)])
        sequences = self._mixture.sequences(np.concatenate([multi, single]), lengths, uniform[1])
        rows = self._mixture.rows(sequences, lengths, rng)
        crops = draw_crops(rng, len(rows), self.crop_scale, self.crop_aspect)
        return StepPlan(rows, lengths, crops, rng.random(len(rows)) < self.flip)


def _check(frames_per_gpu: int, views: tuple[int, int], share: float, mode: str, world_size: int) -> None:
    if mode not in MODES:
        raise DataError(f"data.mode is '{mode}', but must be one of {', '.join(MODES)}")
    if frames_per_gpu < 1 or world_size < 1:
        raise DataError(f"data.frames_per_gpu is {frames_per_gpu} on {world_size} ranks; both must be at least 1")
    if not 1 <= views[0] <= views[1]:
        raise DataError(f"data.views is {views[0]} to {views[1]}; the fewest must be at least 1 and at most the most")
    if not 0 <= share <= 1:
        raise DataError(f"data.imagenet_share is {share}, but must lie between 0 and 1")


def _weights(names: Sequence[str], weights: Mapping[str, float] | None) -> np.ndarray:
    """(data sets,) weights as given, 1 by default."""
    for name, weight in (weights or {}).items():
        if name not in names:
            raise DataError(f"data.weights names '{name}', but the manifests hold {', '.join(names)}")
        if not 0 <= weight < np.inf:
            raise DataError(f"data.weights.{name} is {weight}, but must be a number of at least 0")
    return np.array([(weights or {}).get(name, 1.0) for name in names])


def _kept(count: int, exclude: Iterable[int] | None, only: Iterable[int] | None) -> np.ndarray | None:
    """(count,) bool, sequences to draw from; none: all."""
    if exclude is None and only is None:
        return None
    keep = np.full(count, only is None)
    if only is not None:
        keep[np.asarray(list(only), np.int64)] = True
    if exclude is not None:
        keep[np.asarray(list(exclude), np.int64)] = False
    return keep

"""Sampling of frames with cameras and depth, as VGGT's training draws them (facts of its public code).

A plan is a pure function of (seed, step, rank, world size), like those of pretraining (`fastmum.data.plan`).
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from fastmum.data.colour import JITTER_WIDTH, NOTHING, draw_jitter
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifest, Manifests
from fastmum.data.packing import cumulative
from fastmum.data.plan import given_weights
from fastmum.geometry.crop import VGGT_MARGIN

T = TypeVar("T")

SCALE = (0.8, 1.2)  # share of width and of height that the first crop keeps, at most 1, so half of the draws are 1
MARGIN = 0.3  # of the longer side: the largest number of pixels beyond the target before the last crop, rarest
SHARED_JITTER = 0.7  # probability that all frames of a sequence have the same jitter
GROUND_TRUTH = ("pose", "intrinsics", "depth")  # columns of the manifest


class Rule(NamedTuple):
    """What is special about a data set."""

    percentile: float | None = 98.0  # of a depth map; larger depths are unknown (`clean_depth`)
    max_depth: float | None = None  # metres
    window: int = 0  # frames within this many times the length of the first one; 0: from the whole sequence
    masked: bool = False  # depth outside of the mask is unknown


# By the builder of the manifest, or the name of the data set.
RULES = {
    "vkitti2": Rule(percentile=None, max_depth=80.0, window=8), "wildrgbd": Rule(masked=True), "rgbd": Rule(masked=True)
}  # fmt: skip


class ScenePlan(NamedTuple):
    """What one rank decodes for one step. All frames are of one size."""

    rows: np.ndarray  # (F,) int64, rows of the manifests, sequence by sequence; a row may come several times
    lengths: np.ndarray  # (n,) int64, frames of each sequence, all the same
    size: tuple[int, int]  # width and height in pixels
    scales: np.ndarray  # (F, 2), share of width and height that the first crop keeps
    margins: np.ndarray  # (F,), pixels beyond the size before the last crop
    jitter: np.ndarray  # (F, JITTER_WIDTH), for `fastmum.data.colour.jitter`


class ScenePlanner:
    """Draws plans: the number of frames of a sequence and the aspect ratio, then data sets, sequences and frames.

    Frames are drawn with replacement. Only those that have a pose, intrinsics and depth are drawn, and only sequences
    of at least `min_frames` such frames. DataError: there are none, or settings that cannot be met.

    Args:
        weights: of data sets by name, default 1; 0 excludes a set.
        frames_per_batch: a plan has floor(frames_per_batch / N) sequences of N frames, at least one.
        views: fewest and most frames of a sequence, uniform.
        image_size: width of all frames, a multiple of `patch_size`. The height is the width times the aspect ratio,
            uniform in `aspects` and rounded to 0.01, rounded down to a multiple of `patch_size`.
        augment: random crops and colours; otherwise the largest crop of the size, and the colours of the file.
        exclude, only: sequences never to draw from, and sequences to draw from (None: all).
        ground_truth: False draws from all frames, for training without depth and cameras.
        window: frames are drawn within this many times the length of a sequence from the first one; 0: as the data
            set's rule says, for most sets from the whole sequence.

    Attributes:
        usable: (frames,) bool, the rows that can be drawn, also from sequences of `exclude`.
        notes: one line per data set that is never drawn.
    """

    def __init__(
        self, manifests: Manifests, weights: Mapping[str, float] | None = None, frames_per_batch: int = 48,
        views: tuple[int, int] = (2, 24), min_frames: int = 24, image_size: int = 512,
        aspects: tuple[float, float] = (0.33, 1.0), patch_size: int = 16, seed: int = 0, world_size: int = 1, *,
        augment: bool = True, exclude: Iterable[int] = (), only: Iterable[int] | None = None,
        ground_truth: bool = True, window: int = 0,
    ) -> None:  # fmt: skip
        if image_size % patch_size or image_size < patch_size:
            raise DataError(f"data.image_size is {image_size}, but must be a multiple of the patch size {patch_size}")
        self.manifests, self.frames_per_batch, self.views = manifests, frames_per_batch, views
        self.image_size, self.aspects, self.patch_size = image_size, aspects, patch_size
        self.seed, self.world_size, self.augment, self.ground_truth = seed, world_size, augment, ground_truth
        rules = (rule_of(manifests, name) for name in manifests.datasets)
        self.rules = [rule._replace(window=window or rule.window) for rule in rules]
        self._choose_sequences(min_frames, ground_truth, exclude, only)
        drawn = given_weights(manifests.datasets, weights or {}, self.notes) * [
            len(each) > 0 for each in self._sequences
        ]
        if not drawn.any():
            raise DataError("data.weights is 0 for every data set that has sequences to draw from; raise one of them")
        self._chances = cumulative(drawn)

    def _choose_sequences(
        self, min_frames: int, ground_truth: bool, exclude: Iterable[int], only: Iterable[int] | None
    ) -> None:
        manifests = self.manifests
        self.usable = usable_frames(manifests, min_frames, GROUND_TRUTH if ground_truth else ())
        long_enough = np.logical_or.reduceat(self.usable, manifests.starts[:-1])
        keep = long_enough & (only is None)
        keep[np.array(() if only is None else list(only), np.int64)] = True
        keep[np.array(list(exclude), np.int64)] = False
        numbers = range(len(manifests.datasets))
        self._sequences = [np.flatnonzero(keep & long_enough & (manifests.dataset_of == i)) for i in numbers]
        what = f"{min_frames} frames (data.min_frames){' with pose, intrinsics and depth' * ground_truth}"
        self.notes = [
            f"data set '{name}' is never drawn: none of its sequences has {what}"
            for i, name in enumerate(manifests.datasets)
            if not (long_enough & (manifests.dataset_of == i)).any()
        ]
        if not any(map(len, self._sequences)):
            raise DataError(f"there is no sequence of at least {what} to draw from")

    def plan(self, step: int, rank: int = 0) -> ScenePlan:
        """The plan of a rank for a step."""
        rng = self._generator(step, rank)
        length, count = self._draw_shape(rng)
        width, aspect = self.image_size, round(rng.uniform(*self.aspects), 2)
        height = max(1, int(width * aspect) // self.patch_size) * self.patch_size
        rows = np.concatenate([self._draw_rows(rng, length) for _ in range(count)])
        frames = len(rows)
        # Drawn also if nothing is augmented, so that both have the same frames.
        scales, margins = rng.uniform(*SCALE, (frames, 2)), rng.triangular(0, 0, MARGIN, frames) * max(width, height)
        drawn = draw_jitter(rng, frames).reshape(count, length, JITTER_WIDTH)
        shared = rng.random((count, 1, 1)) < SHARED_JITTER
        colours = np.where(shared, drawn[:, :1], drawn).reshape(frames, JITTER_WIDTH)
        if not self.augment:
            scales, margins, colours = np.ones_like(scales), 0 * margins, np.tile(NOTHING, (frames, 1))
        lengths = np.full(count, length, np.int64)
        return ScenePlan(rows, lengths, (width, height), np.minimum(scales, 1), VGGT_MARGIN + margins, colours)

    def lengths(self, step: int, rank: int = 0) -> np.ndarray:
        """Only the lengths of a plan, in a fraction of the time."""
        length, count = self._draw_shape(self._generator(step, rank))
        return np.full(count, length, np.int64)

    def step_frames(self, step: int) -> int:
        """Frames of a step on all ranks together."""
        return sum(int(self.lengths(step, rank).sum()) for rank in range(self.world_size))

    def _generator(self, step: int, rank: int) -> np.random.Generator:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not one of {self.world_size}")
        return np.random.default_rng((self.seed, step, rank))

    def _draw_shape(self, rng: np.random.Generator) -> tuple[int, int]:
        """Frames of each sequence, and number of sequences."""
        length = int(rng.integers(self.views[0], self.views[1] + 1))
        return length, max(1, self.frames_per_batch // length)

    def _draw_rows(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Rows of a sequence, (length,) int64."""
        dataset = int(np.searchsorted(self._chances, rng.random(), side="right"))
        sequence = int(rng.choice(self._sequences[dataset]))
        first, end = self.manifests.starts[sequence : sequence + 2]
        rows = first + np.flatnonzero(self.usable[first:end])
        anchor, near = int(rng.integers(len(rows))), self.rules[dataset].window * length
        low, high = (max(0, anchor - near), min(len(rows), anchor + near)) if near else (0, len(rows))
        return rows[np.append(anchor, rng.integers(low, high, length - 1))]


def usable_frames(manifests: Manifest, min_frames: int, columns: Iterable[str] = GROUND_TRUTH) -> np.ndarray:
    """Frames that have all `columns`, of sequences that have at least `min_frames` of them; (frames,) bool."""
    usable = np.ones(manifests.num_frames, bool)
    for column in columns:
        usable &= manifests.present(column)
    counts = np.add.reduceat(usable, manifests.starts[:-1], dtype=np.int64)
    return usable & np.repeat(counts >= max(1, min_frames), np.diff(manifests.starts))


def rule_of(manifests: Manifests, dataset: str) -> Rule:
    """The rule of a data set of some manifests."""
    return by_builder(RULES, manifests, dataset) or Rule()


def by_builder(table: Mapping[str, T], manifests: Manifests, dataset: str) -> T | None:
    """The entry of a data set, by the builder of its manifest or by its name; None: there is none."""
    names = (str(part.metadata.get("builder")) for part in manifests.parts if dataset in part.datasets)
    return next((table[name] for name in (*names, dataset) if name in table), None)

"""Which frames a step trains on, and how each is cropped and flipped: the paper's sampling.

A plan is a pure function of (seed, rank, step): resuming a run needs the number of the step and nothing else, and
whoever decodes the frames, the batch is the same.

The rule (supplement, "Sampling"; augmentation from the released code): with the probability `image_share` a batch of
single images; otherwise one number of views S, uniform in a range, and sequences drawn uniformly until the next would
exceed the frames of a batch, S frames without replacement from each. Every frame gets its own random crop and flip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmum.data.sequences import Sequences

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after ten, and takes the centre


@dataclass(frozen=True)
class StepPlan:
    """What one rank decodes for one step.

    Args:
        files: F image files, sequence by sequence.
        spare: for each of them, files to take another from when it cannot be read: those of its sequence.
        lengths: frames of every sequence; their sum is F.
        crops: what to keep of each frame.
    """

    files: tuple[Path, ...]
    spare: tuple[tuple[Path, ...], ...]
    lengths: tuple[int, ...]
    crops: tuple[Crop, ...]


@dataclass(frozen=True)
class Crop:
    """A crop that does not know the frame's size yet.

    Args:
        areas: (attempts,) share of the frame's area.
        aspects: (attempts,) width over height.
        corner: (2,) where in the room that is left, x and y, each in [0, 1).
        flip: mirrored left to right.
    """

    areas: np.ndarray
    aspects: np.ndarray
    corner: np.ndarray
    flip: bool

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels of a frame of this size; the first attempt that fits in it."""
        for area, aspect in zip(self.areas, self.aspects, strict=True):
            w = round(math.sqrt(width * height * area * aspect))
            h = round(math.sqrt(width * height * area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left = int(self.corner[0] * (width - w + 1))
                top = int(self.corner[1] * (height - h + 1))
                return left, top, left + w, top + h
        return centre_box(width, height, self.aspects.min(), self.aspects.max())


def whole_frame() -> Crop:
    """The largest square in the middle of a frame, not flipped."""
    return Crop(np.ones(1), np.ones(1), np.zeros(2), flip=False)


def centre_box(width: int, height: int, min_aspect: float = 1.0, max_aspect: float = 1.0) -> tuple[int, int, int, int]:
    """The largest box in the middle of a frame whose aspect ratio lies within bounds."""
    w = min(width, round(height * max_aspect))
    h = min(height, round(width / min_aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclass(frozen=True)
class StepPlanner:
    """Draws plans. Sequences with fewer frames than the number of views drawn are passed over for that batch.

    Args:
        sequences: multi-view sequences.
        seed: of the run.
        frames_per_batch: most frames of a plan.
        views: fewest and most views of a sequence.
        images: single images, and `image_share`, the share of batches that are drawn from them.
        crop_scale, crop_aspect: ranges of the random crop's area and aspect ratio.
        flip: probability of a flip.
    """

    sequences: Sequences
    seed: int
    frames_per_batch: int
    views: tuple[int, int]
    images: Sequences | None = None
    image_share: float = 0.0
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def plan(self, step: int, rank: int = 0) -> StepPlan:
        """The plan of a step, the same whenever it is asked for."""
        rng = np.random.default_rng((self.seed, rank, step))
        if self.images is not None and rng.random() < self.image_share:
            pool, views = self.images, 1
        else:
            longest = max(map(len, self.sequences.frames))
            pool, views = self.sequences, int(rng.integers(self.views[0], min(self.views[1], longest) + 1))
        long_enough = [frames for frames in pool.frames if len(frames) >= views]
        files, spare = [], []
        for _ in range(self.frames_per_batch // views):
            frames = long_enough[rng.integers(len(long_enough))]
            files += [frames[i] for i in rng.choice(len(frames), size=views, replace=False)]
            spare += [frames if len(frames) > 1 else frames + self._others(pool, rng)] * views
        crops = tuple(self._crop(rng) for _ in files)
        return StepPlan(tuple(files), tuple(spare), (views,) * (len(files) // views), crops)

    @staticmethod
    def _others(pool: Sequences, rng: np.random.Generator) -> tuple[Path, ...]:
        # A single image has no neighbours to be replaced by.
        return tuple(pool.frames[i][0] for i in rng.integers(len(pool), size=4))

    def _crop(self, rng: np.random.Generator) -> Crop:
        low, high = np.log(self.crop_aspect)
        return Crop(
            areas=rng.uniform(*self.crop_scale, size=CROP_ATTEMPTS),
            aspects=np.exp(rng.uniform(low, high, size=CROP_ATTEMPTS)),
            corner=rng.random(2),
            flip=bool(rng.random() < self.flip),
        )

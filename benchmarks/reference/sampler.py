"""The batch sampling of the paper, for `DataLoader(batch_sampler=...)`.

A tenth of the batches are single images. For the others one S is drawn uniformly; data sets are drawn by weight, a
sequence uniformly within, S of its frames without replacement, until the next sequence would pass the number of frames
that a GPU takes: floor(96 / S) sequences of S views. Every GPU draws for itself (supplement, "Sampling").
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import Sampler

FRAMES, VIEWS, IMAGE_SHARE = 96, (2, 24), 0.1  # supplement


class Sequences(NamedTuple):
    """A data set: frames [start, start + length) of all files are a sequence.

    Args:
        starts, lengths: of every sequence.
        weight: how often the data set is drawn.
    """

    starts: Sequence[int]
    lengths: Sequence[int]
    weight: float = 1.0


class PaperSampler(Sampler[list[list[int]]]):
    """Batches, each a list of sequences, each a list of S frames.

    Args:
        datasets: of sequences; at least one has a sequence of as many frames as `views` allows.
        images: numbers of the single images.
        batches: how many.
        frames: of a batch, at most.
        views: fewest and most views of a sequence.
        image_share: of batches.
        seed: of this GPU.
    """

    def __init__(
        self,
        datasets: Sequence[Sequences],
        images: Sequence[int],
        batches: int,
        frames: int = FRAMES,
        views: tuple[int, int] = VIEWS,
        image_share: float = IMAGE_SHARE,
        seed: int = 0,
    ) -> None:
        self.datasets, self.images, self.batches = datasets, images, batches
        self.frames, self.views, self.image_share = frames, views, image_share
        self.random = random.Random(seed)
        self.weights = [dataset.weight for dataset in datasets]

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[list[int]]]:
        for _ in range(self.batches):
            sequences, views = self.shape()
            if views == 1:
                yield [[image] for image in self.random.sample(self.images, sequences)]
            else:
                yield [self.sequence(views) for _ in range(sequences)]

    def shape(self) -> tuple[int, int]:
        """B and S of a batch; S is 1 for single images."""
        if self.random.random() < self.image_share:
            return self.frames, 1
        views = self.random.randint(*self.views)
        return self.frames // views, views

    def sequence(self, views: int) -> list[int]:
        """Frames of a random sequence that has at least `views` frames."""
        while True:
            (dataset,) = self.random.choices(self.datasets, self.weights)
            i = self.random.randrange(len(dataset.lengths))
            if dataset.lengths[i] >= views:
                start = dataset.starts[i]
                return self.random.sample(range(start, start + dataset.lengths[i]), views)

"""The reference's sampling: what the paper says of a batch."""

from collections import Counter
from itertools import chain

import pytest

from benchmarks.reference.sampler import PaperSampler, Sequences

LONG = Sequences(range(0, 300, 30), [30] * 10)
SHORT = Sequences([300, 304], [4, 26], weight=3.0)
IMAGES = range(1000, 1500)


def sampler(batches=400, **settings) -> PaperSampler:
    return PaperSampler([LONG, SHORT], IMAGES, batches, **settings)


def test_batches_are_whole_sequences_of_one_length_without_repetition():
    batches = list(sampler())
    assert len(batches) == len(sampler()) == 400
    sequences = [range(s, s + n) for d in (LONG, SHORT) for s, n in zip(d.starts, d.lengths, strict=True)]
    for batch in batches:
        (views,) = {len(sequence) for sequence in batch}
        assert len(batch) == 96 // views
        for sequence in batch:
            assert len(set(sequence)) == views
            assert any(set(sequence) <= set(frames) for frames in ([IMAGES] if views == 1 else sequences))


def test_a_tenth_are_single_images_and_s_is_uniform():
    drawn = sampler()
    shapes = Counter(drawn.shape()[1] for _ in range(46_000))
    assert shapes.pop(1) / 46_000 == pytest.approx(0.1, abs=0.01)
    assert set(shapes) == set(range(2, 25))
    assert min(shapes.values()) > 0.85 * 1800  # of 1,800 expected
    assert max(shapes.values()) < 1.15 * 1800


def test_datasets_are_drawn_by_weight():
    drawn = sampler()
    sequences = [drawn.sequence(2)[0] for _ in range(4000)]
    assert sum(frame >= 300 for frame in sequences) / 4000 == pytest.approx(0.75, abs=0.03)


def test_single_images_are_not_repeated_and_seeds_are_gpus():
    for batch in sampler(batches=20, image_share=1.0):
        images = list(chain.from_iterable(batch))
        assert len(images) == len(set(images)) == 96
    assert list(sampler(5, seed=1)) == list(sampler(5, seed=1)) != list(sampler(5, seed=2))

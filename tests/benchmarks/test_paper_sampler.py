"""Sampling of the reference: batches as the paper describes them."""

from collections import Counter
from itertools import chain

import pytest

from benchmarks.reference.sampler import PaperSampler, Sequences

LONG = Sequences(range(0, 300, 30), [30] * 10)
SHORT = Sequences([300, 304], [4, 26], weight=3.0)
IMAGES = range(1000, 1500)


def sampler(batches=400, **settings) -> PaperSampler:
    return PaperSampler([LONG, SHORT], IMAGES, batches, **settings)


def test_batches_have_one_length_and_no_repetitions():
    sources = [set(range(s, s + n)) for d in (LONG, SHORT) for s, n in zip(d.starts, d.lengths, strict=True)]
    batches = list(sampler())
    assert len(batches) == len(sampler()) == 400
    for batch in batches:
        (views,) = {len(sequence) for sequence in batch}
        assert len(batch) == 96 // views
        for sequence in map(set, batch):
            assert len(sequence) == views
            assert sequence <= set(IMAGES) if views == 1 else any(sequence <= source for source in sources)
    for batch in sampler(batches=20, image_share=1.0):
        images = list(chain.from_iterable(batch))
        assert len(images) == len(set(images)) == 96


def test_shares_of_lengths_and_data_sets():
    drawn = sampler()
    shapes = Counter(drawn.shape()[1] for _ in range(46_000))
    assert shapes.pop(1) / 46_000 == pytest.approx(0.1, abs=0.01)
    assert set(shapes) == set(range(2, 25))
    assert min(shapes.values()) > 0.85 * 1800  # of 1,800 expected
    assert max(shapes.values()) < 1.15 * 1800
    sequences = [drawn.sequence(2)[0] for _ in range(4000)]
    assert sum(frame >= 300 for frame in sequences) / 4000 == pytest.approx(0.75, abs=0.03)


def test_seeds():
    assert list(sampler(5, seed=1)) == list(sampler(5, seed=1)) != list(sampler(5, seed=2))

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


def test_batches_are_one_s_of_whole_sequences_without_repetition():
    batches = list(sampler())
    assert len(batches) == len(sampler()) == 400
    for batch in batches:
        (views,) = {len(sequence) for sequence in batch}
        assert len(batch) == 96 // views
        for sequence in batch:
            assert len(set(sequence)) == views
            if views == 1:
                assert sequence[0] in IMAGES
            else:
                of = [
                    r
                    for d in (LONG, SHORT)
                    for s, n in zip(d.starts, d.lengths, strict=True)
                    for r in [range(s, s + n)]
                ]
                assert any(set(sequence) <= set(frames) for frames in of)


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


def test_single_images_are_not_repeated_in_a_batch():
    for batch in sampler(batches=20, image_share=1.0):
        images = list(chain.from_iterable(batch))
        assert len(images) == len(set(images)) == 96


def test_seeds_are_gpus():
    assert list(sampler(5, seed=1)) == list(sampler(5, seed=1)) != list(sampler(5, seed=2))

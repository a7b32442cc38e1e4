"""Data sets by weight; sequences and frames uniformly."""

import numpy as np
import pytest
from catalogue import Catalogue
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmum.data.plan import Mixture, by_frames, by_weight


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=20), min_size=1, max_size=4),
    st.integers(2, 30), st.integers(0, 2**32),
)  # fmt: skip
@settings(deadline=None, max_examples=50)
def test_the_eligible_sequences_are_those_long_enough(lengths, longest, seed):
    catalogue = Catalogue(**{f"d{i}": v for i, v in enumerate(lengths)})
    rng = np.random.default_rng(seed)
    keep = rng.random(len(catalogue.starts) - 1) < 0.7
    keep[0] = True
    mixture = Mixture(catalogue, None, (1, longest), keep)
    sizes = np.diff(catalogue.starts)
    for dataset in range(len(lengths)):
        for views in range(longest + 1):
            wanted = np.flatnonzero((catalogue.dataset_of == dataset) & (sizes >= views) & keep)
            count = mixture.eligible[dataset, views]
            assert count == len(wanted)
            if count:
                uniform = (np.arange(count) + rng.random(count)) / count
                full = np.full(count, dataset), np.full(count, views)
                assert sorted(mixture.sequences(*full, uniform)) == wanted.tolist()


def test_frames_are_drawn_without_replacement_and_uniformly():
    mixture, rng = Mixture(Catalogue(a=[30], i=[1]), None, (2, 24)), np.random.default_rng(0)
    mixture.settle(np.array([7, 24]), np.array([0.5, 0.5]), level=True)
    rows = np.array([mixture.draw(np.array([24, 7, 1]), 1, rng) for _ in range(4000)])
    assert (rows[:, 31] == 30).all(), "the single image"
    for columns in (rows[:, :24], rows[:, 24:31]):
        assert (np.diff(np.sort(columns, axis=1), axis=1) > 0).all()
        share = np.bincount(columns.ravel(), minlength=30) / columns.size
        assert np.abs(share - 1 / 30).max() < 0.004
    first = np.bincount(rows[:, 0], minlength=30) / 4000
    assert np.abs(first - 1 / 30).max() < 0.015, "in random order"


def test_data_sets_of_short_sequences_have_their_weight_of_the_frames():
    eligible = np.array([[True, True, True], [True, True, False], [True, False, False]])
    shares, weights = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.35, 0.25])
    table = by_frames(weights, eligible, shares)
    np.testing.assert_allclose(table.sum(axis=1), 1)
    np.testing.assert_allclose(shares @ table, weights, atol=1e-8)
    assert (table[~eligible] == 0).all()
    assert shares @ by_weight(weights, eligible) != pytest.approx(weights, abs=0.01)
    np.testing.assert_allclose(by_frames(weights, np.ones((3, 3), bool), shares), np.tile(weights, (3, 1)))


def test_weights_that_cannot_be_met_are_noted():
    mixture = Mixture(Catalogue(short=[3] * 9, long=[24] * 9), {"short": 9.0}, (2, 24))
    got = mixture.settle(np.array([2, 24]), np.array([0.2, 0.8]), level=True)
    np.testing.assert_allclose(got, [0.2, 0.8], atol=1e-3)
    assert len(mixture.notes) == 2
    assert "'short' gets 20.0%" in mixture.notes[0]

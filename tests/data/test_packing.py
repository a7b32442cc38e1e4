"""Conditioned Poisson counts, against the list of all multisets."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastmum.data.packing import Packing, Totals, fit


def multisets(sizes, total, budget=None):
    """All counts (n,) of the sizes with this total and at most `budget` pairs."""
    ranges = [range(total // size + 1) for size in sizes]
    found = np.array([c for c in itertools.product(*ranges) if np.dot(c, sizes) == total]).reshape(-1, len(sizes))
    pairs = found @ (np.array(sizes) * (np.array(sizes) - 1) // 2)
    return found if budget is None else found[pairs <= budget]


@pytest.fixture(params=[None, 20])
def small(request):
    """A packing of 12 frames, and every multiset with its probability and weight."""
    sizes, weights = np.array([2, 3, 5, 6]), np.array([0.7, 1.9, 0.2, 1.1])
    counts = multisets(sizes, 12, request.param)
    weight = np.array([np.prod([w**n / math.factorial(n) for w, n in zip(weights, c, strict=True)]) for c in counts])
    return Packing(sizes, weights, 12, request.param), counts, weight


def test_moments_are_those_of_all_multisets(small):
    packing, counts, weight = small
    chance = weight / weight.sum()
    mean = chance @ counts
    assert packing.log_weight(12) == pytest.approx(math.log(weight.sum()))
    np.testing.assert_allclose(packing.counts(12), mean)
    np.testing.assert_allclose(packing.covariance(12), (counts.T * chance) @ counts - np.outer(mean, mean), atol=1e-12)


def test_draws_have_the_probabilities_of_the_multisets(small):
    packing, counts, weight = small
    rng = np.random.default_rng(0)
    drawn = [np.bincount(packing.draw(12, rng), minlength=7)[[2, 3, 5, 6]] for _ in range(20_000)]
    seen = np.array([(np.array(drawn) == c).all(1).mean() for c in counts])
    assert seen.sum() == 1, "each is a multiset of the list"
    np.testing.assert_allclose(seen, weight / weight.sum(), atol=0.012)


sizes_and_total = st.tuples(st.sets(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 24))


@given(sizes_and_total, st.integers(0, 2**32), st.none() | st.integers(0, 60))
@settings(deadline=None)
def test_a_draw_fills_exactly_within_the_budget(case, seed, budget):
    sizes, total = np.array(sorted(case[0])), case[1]
    packing = fit(sizes, np.full(len(sizes), 1 / len(sizes)), Totals((total, total), (1.0, 0.0)), budget)
    if not len(multisets(sizes, total, budget)):
        assert packing is None
        return
    lengths = packing.draw(total, np.random.default_rng(seed))
    assert lengths.sum() == total
    assert set(lengths) <= set(sizes)
    if budget is not None:
        assert (lengths * (lengths - 1) // 2).sum() <= budget


@given(sizes_and_total, st.integers(0, 2**32), st.none() | st.integers(0, 60))
@settings(deadline=None)
def test_shares_that_can_be_met_are_met(case, seed, budget):
    """Any mixture of all multisets with positive probabilities can be met."""
    sizes, total = np.array(sorted(case[0])), case[1]
    counts = multisets(sizes, total, budget)
    assume(len(counts) and (counts.sum(axis=0) > 0).all())
    chance = np.random.default_rng(seed).random(len(counts)) + 0.2
    shares = sizes * (chance / chance.sum() @ counts) / total
    totals = Totals((total, total), (1.0, 0.0))
    np.testing.assert_allclose(fit(sizes, shares, totals, budget).shares(sizes, totals), shares, atol=1e-6)


def test_how_a_machine_rounds_does_not_matter(monkeypatch):
    """Near the end the value falls by less than its rounding error, which must not look like standing still."""
    sizes, total = np.array([1, 2, 4, 9]), 14
    counts, totals = multisets(sizes, total), Totals((total, total), (1.0, 0.0))
    chance = np.random.default_rng(1679).random(len(counts)) + 0.2
    shares = sizes * (chance / chance.sum() @ counts) / total
    rounding, exact = np.random.default_rng(0), Packing.log_weight
    monkeypatch.setattr(
        Packing, "log_weight", lambda self, total: exact(self, total) * (1 + 2e-14 * rounding.standard_normal())
    )
    for _ in range(300):
        np.testing.assert_allclose(fit(sizes, shares, totals).shares(sizes, totals), shares, atol=1e-6)


def test_two_totals_are_fitted_together():
    sizes, totals = np.arange(2, 25), Totals((86, 87), (0.6, 0.4))
    shares = sizes * (96 // sizes) / (sizes * (96 // sizes)).sum()
    for budget in (None, 517):
        packing = fit(sizes, shares, totals, budget)
        np.testing.assert_allclose(packing.shares(sizes, totals), shares, atol=1e-7)


def test_shares_that_cannot_be_met_are_met_nearly():
    """Two of 5 fill 10 and 4 does not go with them: with 4s there must be 2s."""
    sizes, totals = np.array([2, 4, 5]), Totals((10, 10), (1.0, 0.0))
    packing = fit(sizes, np.array([0.02, 0.49, 0.49]), totals)
    got = packing.shares(sizes, totals)
    assert got.sum() == pytest.approx(1)
    assert got[0] >= got[1] / 4 - 1e-9
    assert abs(got[2] - 0.49) < 0.15
    assert packing.draw(10, np.random.default_rng(0)).sum() == 10


def test_lengths_in_no_multiset_are_dropped():
    packing = fit(np.array([2, 4, 7]), np.full(3, 1 / 3), Totals((8, 8), (1.0, 0.0)))
    assert packing.sizes.tolist() == [2, 4]
    np.testing.assert_allclose(packing.shares(np.array([2, 4, 7]), Totals((8, 8), (1.0, 0.0))), [0.5, 0.5, 0])

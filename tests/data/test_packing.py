"""Pools of full batches: exact sums, expected shares, level cost."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastmum.data.packing import _calibrate, fill_rank, paper_shares

LENGTHS = tuple(range(2, 25))


def chances(filling):
    return np.diff(filling.cumulative, prepend=0)


def uneven(filling):
    """Greatest relative deviation of a batch's cost of attention from the mean."""
    cost = filling.counts @ filling.sizes**2
    return np.abs(cost / (chances(filling) @ cost) - 1).max()


@given(
    st.integers(1, 130), st.sets(st.integers(1, 24), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.03, 0.1, 0.5, 1.0]), st.booleans(), st.integers(0, 2**32),
)  # fmt: skip
@example(6, {2, 3}, 0.1, True, 0)
@example(8, {4}, 0.0, False, 0)
@settings(deadline=None, max_examples=40)
def test_every_batch_is_exactly_full(frames, lengths, single_share, level, seed):
    lengths = tuple(sorted(s for s in lengths if s <= frames))
    filling = fill_rank(frames, lengths, single_share, level)
    if filling is None:
        totals = {0}
        for _ in range(frames):
            totals |= {t + s for t in totals for s in lengths if t + s <= frames}
        assert max(totals) < (1 - single_share) * frames, "the rest would be too many single images"
        return
    assert frames % filling.frames == 0
    assert (filling.counts >= 0).all()
    assert (filling.counts @ filling.sizes == filling.frames).all()
    assert filling.shares[0] == pytest.approx(single_share, abs=1e-4)
    assert filling.shares == pytest.approx(chances(filling) @ filling.counts * filling.sizes / filling.frames)
    drawn, singles = filling.draw(np.random.default_rng(seed))
    assert drawn.sum() + singles == filling.frames
    assert set(drawn) <= set(lengths)


@pytest.mark.parametrize(
    ("frames", "single_share"), [(96, 0.1), (96, 0.0), (97, 0.0), (128, 0.1), (192, 0.1), (1021, 0.1)]
)
def test_level_batches_have_the_paper_s_shares_and_a_bounded_cost(frames, single_share):
    filling = fill_rank(frames, LENGTHS, single_share, True)
    wanted = (1 - single_share) * paper_shares(np.array(LENGTHS), filling.frames)
    assert np.abs(filling.shares - [single_share, *wanted]).sum() / 2 <= 3e-3
    assert filling.distance <= 3e-3
    mean = filling.frames * (filling.shares @ filling.sizes)
    assert chances(filling) @ filling.counts @ filling.sizes**2 == pytest.approx(mean)
    assert uneven(filling) <= 0.011
    assert 1 / (chances(filling) ** 2).sum() > 500, "effective number of batches"


def test_units_are_the_paper_s_batch_where_it_divides_the_frames():
    units = {48: 48, 96: 96, 128: 128, 192: 96, 200: 100, 288: 96, 97: 97}
    assert {frames: fill_rank(frames, LENGTHS, 0.1, False).frames for frames in units} == units
    assert paper_shares(np.array([20, 24]), 96).tolist() == [80 / 176, 96 / 176], "S = 20 leaves 16 frames empty"
    # One sequence of 24 views costs more than the mean of 48 frames, whatever the others are.
    filling = fill_rank(48, LENGTHS, 0.1, True)
    assert filling.distance <= 3e-3
    assert 0.01 < uneven(filling) < 0.2


def test_shares_that_cannot_be_met_are_approximated_and_larger_units_tried():
    """Four sequences of 86 or 87 frames have a mean of 21.6 views, five lengths from 20 to 24 one of 22.1."""
    lengths = tuple(range(20, 25))
    small, large = fill_rank(96, lengths, 0.1, False), fill_rank(960, lengths, 0.1, False)
    assert 0.05 < small.distance < 0.2
    assert small.shares[0] == pytest.approx(0.1, abs=1e-4), "single images have priority"
    assert (large.frames, large.distance) == (960, pytest.approx(0, abs=3e-3))


def test_calibration_finds_the_known_solution():
    """Of the batches 3 + 3, 2 + 2 + 2 and 3 + 2 + a single image; no batch has a sequence of 5."""
    batches, sizes = np.array([[0, 0, 2, 0], [0, 3, 0, 0], [1, 1, 1, 0]]), np.array([1, 2, 3, 5])
    p = np.array([0.5, 0.2, 0.3])
    wanted = p @ (batches * sizes / 6)
    assert chances(_calibrate(6, sizes, batches, wanted)) == pytest.approx(p, abs=1e-3)
    with_five = np.array([wanted[0], *0.9 * wanted[1:3], 1 - wanted[0] - 0.9 * wanted[1:3].sum()])
    filling = _calibrate(6, sizes, batches, with_five)
    assert chances(filling) == pytest.approx(p, abs=1e-3), "the other lengths share its part"
    assert filling.distance == pytest.approx(with_five[3], abs=1e-3)

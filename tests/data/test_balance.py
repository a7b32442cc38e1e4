"""Units: exactly full for whatever can be filled, and level where it can be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmum.data.balance import fill_rank, paper_shares


def possible(frames, sizes):
    """Totals up to `frames` that sequences can have, by trying all."""
    totals = {0}
    for _ in range(frames):
        totals |= {t + s for t in totals for s in sizes if t + s <= frames}
    return totals


@given(
    st.integers(1, 200), st.integers(1, 24), st.integers(0, 23),
    st.sampled_from([0.0, 0.03, 0.1, 0.5, 1.0]), st.booleans(), st.integers(0, 2**32),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_every_unit_is_exactly_full(frames, least, more, single_share, level, seed):
    sizes = np.arange(least, min(least + more, frames) + 1)
    filling = fill_rank(frames, sizes, single_share, level)
    if filling is None:
        most = max(possible(frames, sizes.tolist()))
        assert most < (1 - single_share) * frames, "the rest would be more single images than wanted"
        return
    assert frames % filling.frames == 0
    assert filling.totals.mean == pytest.approx((1 - single_share) * filling.frames)
    rng = np.random.default_rng(seed)
    for second, (total, chance) in enumerate(zip(*filling.totals, strict=True)):
        if chance:
            lengths = filling.draw(bool(second), rng)
            assert lengths.sum() == total
            assert set(lengths) <= set(sizes)


@pytest.mark.parametrize("single_share", [0.0, 0.1])
@pytest.mark.parametrize("frames", [96, 97, 128, 192, 1021])
def test_level_units_have_the_paper_s_shares_and_a_bounded_cost(frames, single_share):
    sizes = np.arange(2, 25)
    filling = fill_rank(frames, sizes, single_share, level=True)
    shares = paper_shares(sizes, filling.frames)
    assert filling.cap == 1.01
    np.testing.assert_allclose(filling.shares(sizes), shares, atol=1e-6)
    unit, rng = filling.frames, np.random.default_rng(0)
    mean = unit * (single_share + (1 - single_share) * shares @ sizes)
    for second in (False, True) if single_share else (bool(filling.totals.chances[1]),):
        lengths = [filling.draw(second, rng) for _ in range(50)]
        cost = np.array([(s**2).sum() + unit - s.sum() for s in lengths])
        assert cost.max() <= 1.01 * mean


def test_the_unit_is_the_paper_s_batch_where_it_divides_the_frames():
    sizes = np.arange(2, 25)
    units = {frames: fill_rank(frames, sizes, 0.1, level=True).frames for frames in (48, 96, 128, 192, 200, 288, 97)}
    assert units == {48: 48, 96: 96, 128: 128, 192: 96, 200: 100, 288: 96, 97: 97}


def test_short_batches_are_as_level_as_their_shares_allow():
    """Half of 48 frames in one sequence costs more than the mean, however the others are chosen."""
    sizes = np.arange(2, 25)
    filling = fill_rank(48, sizes, 0.1, level=True)
    assert 1.01 < filling.cap < 1.2
    np.testing.assert_allclose(filling.shares(sizes), paper_shares(sizes, 48), atol=1e-6)


def test_shares_of_the_paper():
    """Of 96 frames S = 20 leaves 16 empty."""
    assert paper_shares(np.array([20, 24]), 96).tolist() == [80 / 176, 96 / 176]

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmum.report.chart import thin
from fastmum.report.scale import scale_for, write, write_ticks

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False)


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1), st.booleans())
def test_all_values_lie_within_the_plane(values, from_zero):
    scale = scale_for(values, 100, 0, from_zero)
    assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in values)


@settings(deadline=None)
@given(st.lists(st.floats(1e-9, 1e9), min_size=1))
def test_so_they_do_on_a_logarithmic_one(values):
    scale = scale_for(values, 100, 0, log=True)
    assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in values)
    assert 1 <= len(scale.ticks()) <= 8 or scale.high / scale.low < 2.5


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 8))
def test_ticks_are_a_few_within_the_scale(low, width, count):
    scale = scale_for([low, low + width], 0, 1)
    ticks = scale.ticks(count)
    assert count / 2.5 - 1 <= len(ticks) <= count + 1
    assert all(scale.low - 1e-9 * abs(scale.low) <= tick <= scale.high + 1e-9 * abs(scale.high) for tick in ticks)
    assert len(set(write_ticks(ticks))) == len(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12345.6, "12,346"), (0.08123, "0.0812"), (0.5, "0.500"), (2.0, "2"), (1.5e6, "1.5M"), (2.2e9, "2.2G"),
     (3e-5, "3e-5"), (-0.25, "-0.250"), (12.34, "12.3")],
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert write(value) == text


def test_shares_for_people():
    assert write(0.4312, percent=True) == "43.1 %"


def test_labels_of_ticks():
    assert write_ticks([0, 100_000, 200_000]) == ["0", "100k", "200k"]
    assert write_ticks([0.0, 0.05, 0.1]) == ["0.00", "0.05", "0.10"]
    assert write_ticks([0.0, 0.1, 0.2], percent=True) == ["0 %", "10 %", "20 %"]
    assert write_ticks([0, 1e-5, 2e-5]) == ["0", "1e-5", "2e-5"]
    assert write_ticks([0, 5e-5, 1e-4, 1.5e-4]) == ["0.0", "0.5e-4", "1.0e-4", "1.5e-4"]


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=200), st.integers(1, 50))
def test_thinned_points_are_means_of_all(values, most):
    points = list(enumerate(values))
    thinned = thin(points, most)
    assert len(thinned) <= most
    assert thinned[-1][0] == points[-1][0]
    assert min(low for *_, low, _ in thinned) == min(values)
    assert max(high for *_, high in thinned) == max(values)
    for _, mean, low, high in thinned:
        assert low - 1e-3 <= mean <= high + 1e-3
        assert math.isfinite(mean)

"""Cutting numbered frames, against counts by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmum.data.rules.chunks import CHUNK, cut_into_chunks


def test_the_paper_cuts_at_every_hundredth_frame():
    assert CHUNK == 100
    assert cut_into_chunks(250) == [range(100), range(100, 200), range(200, 250)]
    assert cut_into_chunks(200) == [range(100), range(100, 200)]
    assert cut_into_chunks(7) == [range(7)]
    assert cut_into_chunks(0) == []


@pytest.mark.parametrize(
    ("frames", "lengths"), [(0, []), (1, [1]), (23, [23]), (24, [24]), (47, [47]), (48, [24, 24]), (73, [24, 24, 25])]
)
def test_the_released_scripts_give_the_rest_to_the_last_chunk(frames, lengths):
    assert [len(c) for c in cut_into_chunks(frames, 24, last_takes_rest=True)] == lengths


@given(st.integers(0, 400), st.integers(1, 120), st.booleans())
def test_every_frame_is_in_one_chunk(frames, size, rest):
    chunks = cut_into_chunks(frames, size, rest)
    assert [i for chunk in chunks for i in chunk] == list(range(frames))
    assert all(len(chunk) == size for chunk in chunks[:-1])
    assert all(len(chunk) <= (2 * size - 1 if rest else size) for chunk in chunks)

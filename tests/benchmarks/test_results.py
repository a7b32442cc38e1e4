"""Ratios, units and tables of duels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.results import (
    COMPILED,
    FASTMUM,
    FRAMES_A_SECOND,
    HEADINGS,
    REFERENCE,
    Result,
    results_of,
    rows,
    text_table,
    write,
)

TIMES = st.lists(st.tuples(*[st.floats(1e-6, 1e3)] * 2), min_size=1, max_size=20)


def test_ratio_is_taken_round_by_round():
    # Both slow down together, so every round has the same ratio.
    result = Result("g", "w", rounds={REFERENCE: [2.0, 4.0, 8.0], FASTMUM: [1.0, 2.0, 4.0]})
    assert result.ratio() == (2.0, 2.0, 2.0)
    result = Result("g", "w", rounds={REFERENCE: [1.0, 2.0, 3.0, 4.0, 5.0], FASTMUM: [1.0] * 5})
    assert result.ratio() == (3.0, 2.0, 4.0)
    assert str(result.ratio()) == "3.00 (2.00 to 4.00)"
    assert result.spread == "quartiles of 5"
    assert result.ratio(COMPILED) is None


def test_more_frames_a_second_are_better():
    result = Result("g", "w", FRAMES_A_SECOND, rounds={REFERENCE: [10.0, 15.0], FASTMUM: [20.0, 50.0]})
    assert result.ratio() == (pytest.approx(8 / 3), 2.0, pytest.approx(10 / 3))
    assert result.value(FASTMUM) == "35 frames/s"


def test_spread_of_few_rounds():
    result = Result("g", "w", rounds={REFERENCE: [1.0, 2.0, 4.0], FASTMUM: [1.0] * 3})
    assert result.ratio() == (2.0, 1.0, 4.0)
    assert result.spread == "least to most of 3"
    (row,) = rows([result])
    assert dict(zip(HEADINGS, row, strict=True))["rounds"] == "least to most of 3"


@given(TIMES)
def test_the_spread_encloses_the_median(pairs):
    result = Result("g", "w", rounds={REFERENCE: [a for a, _ in pairs], FASTMUM: [b for _, b in pairs]})
    ratio = result.ratio()
    slack = 1e-12 * ratio.high
    assert ratio.low - slack <= ratio.median <= ratio.high + slack
    assert min(a / b for a, b in pairs) - slack <= ratio.low
    assert ratio.high <= max(a / b for a, b in pairs) + slack


def test_units():
    for value, unit, text in (
        (2.5, "s", "2.5 s"), (0.0123, "s", "12.3 ms"), (4.2e-5, "s", "42 us"), (1e-8, "s", "0.01 us"),
        (0.0, "s", "0 us"), (3.25e9, "bytes", "3.25 GB"), (4.1e12, "FLOP/s", "4.1 TFLOP/s"),
        (7.0, "apples", "7 apples"),
    ):  # fmt: skip
        assert write(value, unit) == text


def test_note_has_rates_and_the_share_of_the_peak():
    info = {"bytes": 3e9, "flops": 2e14, "peak": 8e14}
    result = Result("g", "w", rounds={REFERENCE: [3.0], FASTMUM: [0.5]}, info=info)
    assert result.note == "6 GB/s, 400 TFLOP/s, MFU 50.0%"
    assert Result("g", "w", rounds={REFERENCE: [1.0]}, info=info).note == ""


def entry(name: str, what: str = "thing", data=(1.0, 2.0), **info) -> dict:
    about = {"group": "g", "what": what, "contestant": name, "unit": "s", **info}
    return {"extra_info": about, "stats": {"data": list(data)}}


def test_entries_of_other_benchmarks_are_skipped():
    entries = [{"extra_info": {}, "stats": {"data": [1.0]}}, entry(REFERENCE), entry(FASTMUM, data=(0.5, 0.5))]
    (result,) = results_of(entries)
    assert result.ratio() == (3.0, 2.0, 4.0)


def test_two_duels_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="'g: thing' is there twice for reference"):
        results_of([entry(REFERENCE), entry(REFERENCE)])


def test_table_is_aligned_and_grouped():
    results = results_of(
        [entry(REFERENCE), entry(FASTMUM), entry(REFERENCE, "a longer name"), entry(FASTMUM, "a longer name")]
    )
    header, *lines = text_table([*results, Result("other", "w", rounds={REFERENCE: [1.0], FASTMUM: [1.0]})])
    assert header.split("  ")[0].strip() == "g"
    assert lines[0].index("1.00 (") == lines[1].index("1.00 (")
    assert lines[2] == ""
    assert lines[3].startswith("other")

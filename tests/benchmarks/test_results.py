"""Ratios, units and tables of duels, and of offline predictions with the GPU-hours projected from them."""

import json

import pytest

from benchmarks import results as duels
from benchmarks.projection import ProjectionError, projection_tables, read_predictions
from benchmarks.results import COMPILED, FASTMUM, FRAMES_A_SECOND, HEADINGS, REFERENCE, Result, results_of

TIMES = {"low": 100.0, "likely": 150.0, "high": 300.0}
PARTS = [{"class": "cuBLAS products", "kind": kind, "ms": TIMES} for kind in ("one", "other")]
SIDE = {"flops": 2.6e13, "bytes": 1.5e11, "launches": 1200, "peak_bytes": 3.1e10, "predicted_ms": TIMES}
PREDICTIONS = {
    "gpu": "A100-80GB", "model": "mum_vitl16", "frames": 96, "fastmum": SIDE,
    "reference": SIDE | {"launches": 5000},
}  # fmt: skip


def duel(reference: list[float], fastmum: list[float], unit: str = "s", **info) -> Result:
    return Result("g", "w", unit, rounds={REFERENCE: reference, FASTMUM: fastmum}, info=info)


def test_ratio_is_taken_round_by_round():
    assert duel([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]).ratio() == (2.0, 2.0, 2.0)  # both slow down together
    result = duel([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert result.ratio() == (3.0, 2.0, 4.0)
    assert str(result.ratio()) == "3.00 (2.00 to 4.00)"
    assert result.spread == "quartiles of 5"
    assert result.ratio(COMPILED) is None
    assert duel([3.0], [1.0]).ratio() == (3.0, 3.0, 3.0)
    few = duel([1.0, 2.0, 4.0], [1.0] * 3)
    assert few.ratio() == (2.0, 1.0, 4.0)
    (row,) = duels.rows([few])
    assert few.spread == dict(zip(HEADINGS, row, strict=True))["rounds"] == "least to most of 3"
    rate = duel([10.0, 15.0], [20.0, 50.0], FRAMES_A_SECOND)  # more is better
    assert rate.ratio() == (pytest.approx(8 / 3), 2.0, pytest.approx(10 / 3))
    assert rate.value(FASTMUM) == "35 frames/s"


def test_units_and_rates():
    for value, unit, text in (
        (2.5, "s", "2.5 s"), (0.0123, "s", "12.3 ms"), (1e-8, "s", "0.01 us"), (0.0, "s", "0 us"),
        (3.25e9, "bytes", "3.25 GB"), (4.1e12, "FLOP/s", "4.1 TFLOP/s"), (7.0, "apples", "7 apples"),
    ):  # fmt: skip
        assert duels.write(value, unit) == text
    info = {"bytes": 3e9, "flops": 2e14, "peak": 8e14}
    assert duel([3.0], [0.5], **info).note == "6 GB/s, 400 TFLOP/s, MFU 50.0%"
    assert Result("g", "w", rounds={REFERENCE: [1.0]}, info=info).note == ""


def entry(name: str, what: str = "thing") -> dict:
    return {
        "extra_info": {"group": "g", "what": what, "contestant": name, "unit": "s"},
        "stats": {"data": [1.0, 2.0] if name == REFERENCE else [0.5, 0.5]},
    }


def test_entries_of_benchmarks_and_their_table():
    other = {"extra_info": {}, "stats": {"data": [1.0]}}
    entries = [entry(name, what) for what in ("thing", "a longer name") for name in (REFERENCE, FASTMUM)]
    results = results_of([other, *entries])
    assert [result.ratio() for result in results] == 2 * [(3.0, 2.0, 4.0)]
    with pytest.raises(ValueError, match="'g: thing' is there twice for reference"):
        results_of([entry(REFERENCE), entry(REFERENCE)])
    header, *lines = duels.text_table([*results, Result("other", "w", rounds={REFERENCE: [1.0], FASTMUM: [1.0]})])
    assert header.split("  ")[0].strip() == "g"
    assert lines[0].index("3.00 (") == lines[1].index("3.00 (")  # aligned
    assert lines[2] == ""
    assert lines[3].startswith("other")


def test_tables_of_predictions(tmp_path):
    path = tmp_path / "offline.json"
    path.write_text(json.dumps(PREDICTIONS))
    text = "\n".join(projection_tables(read_predictions(path)))
    for line in (
        "For mum_vitl16, 96 frames per GPU, A100-80GB.", "4,608 GPU-hours",
        "| A100-80GB | fastmum, `compile=full` | 150 | 1,200 | 31.0 | 150 (100 to 300) |  | 1,333 (889 to 2,667) |",
        "| A100-80GB | reference, eager | 150 | 5,000 | 31.0 | 150 (100 to 300) |  | 1,333 (889 to 2,667) |",
    ):  # fmt: skip
        assert line in text
    assert "compiled |" not in text
    compiled = SIDE | {"compiled_ratio": {"low": 1, "likely": 1, "high": 1}, "host_ms": TIMES, "parts": PARTS}
    shares = {"cuBLAS products": {"low": 0.4, "likely": 0.5, "high": 0.6, "source": "a paper"}}
    text = "\n".join(projection_tables(PREDICTIONS | {"reference_compiled": compiled, "efficiencies": shares}))
    for line in (
        "| reference, compiled | 150 | 1,200 | 31.0 | 150 (100 to 300) | 1.00 (1.00 to 1.00) |",
        "| cuBLAS products | 300.0 (200.0 to 600.0) |", "| cuBLAS products | 0.50 (0.40 to 0.60) | a paper |",
    ):  # fmt: skip
        assert line in text


def test_other_predictions_are_refused(tmp_path):
    path = tmp_path / "offline.json"
    for text, named in (
        (None, "cannot be read"), ("{", "JSON"), ("[]", "'fastmum'"), (json.dumps({"fastmum": SIDE}), "'reference'"),
        (json.dumps(PREDICTIONS | {"reference": {"flops": 1}}), "reference.bytes"),
        (json.dumps(PREDICTIONS | {"reference": SIDE | {"predicted_ms": 150.0}}), "reference.predicted_ms.low"),
    ):  # fmt: skip
        if text is not None:
            path.write_text(text)
        with pytest.raises(ProjectionError, match=f"offline.json.*{named}"):
            read_predictions(path)

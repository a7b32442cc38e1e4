"""Duels: a wrong result has no speed, contestants take turns, and every one becomes an entry of pytest-benchmark."""

from __future__ import annotations

from time import sleep
from types import SimpleNamespace

import pytest
import torch

from benchmarks.duel import ROUND_SECONDS, Duel, WrongResultError, interleave, largest_error, rotated
from benchmarks.results import COMPILED, FASTMUM, REFERENCE, results_of

CPU = torch.device("cpu")


@pytest.fixture
def entries(benchmark, request):
    """Entries that this test registers; they are taken out of the session's table again."""
    benchmark._mode = "used by a duel, or only there to be asked"
    session = request.config._benchmarksession
    before = len(session.benchmarks)
    if benchmark.disabled:
        pytest.skip("pytest-benchmark is switched off")
    yield lambda: [entry.as_dict() for entry in session.benchmarks[before:]]
    del session.benchmarks[before:]


def constant(value: float, calls: list[str] | None = None, name: str = "", dtype: torch.dtype = torch.float32):
    def run() -> torch.Tensor:
        if calls is not None:
            calls.append(name)
        return torch.full((8,), value, dtype=dtype)

    return run


def test_wrong_result_is_refused_before_anything_is_timed(benchmark, entries):
    duel = Duel(benchmark, CPU, rounds=3)
    with pytest.raises(WrongResultError, match=r"thing: fastmum differs from the reference by 1.00e-03, .* no speed"):
        duel("group", "thing", {REFERENCE: constant(1.0), FASTMUM: constant(1.001)})
    assert entries() == []


@pytest.mark.parametrize(("dtype", "wrong", "right"), [(torch.float32, 1e-4, 5e-6), (torch.bfloat16, 0.1, 0.008)])
def test_tolerance_is_of_the_dtype(benchmark, entries, dtype, wrong, right):
    duel = Duel(benchmark, CPU, rounds=1)
    duel.check("", {REFERENCE: constant(1.0, dtype=dtype), FASTMUM: constant(1 + right, dtype=dtype)})
    with pytest.raises(WrongResultError):
        duel.check("", {REFERENCE: constant(1.0, dtype=dtype), FASTMUM: constant(1 + wrong, dtype=dtype)})


def test_the_worst_of_several_tensors_counts():
    good, bad = torch.ones(4), torch.ones(4) * 1.5
    error, of_tolerance = largest_error([good, bad, good.bfloat16()], [good, good, good.bfloat16() * 1.01])
    assert error == pytest.approx(0.5)
    assert of_tolerance > 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_wrong(value):
    assert largest_error(torch.tensor([1.0, value]), torch.ones(2))[1] > 1


def test_zeros_are_compared_absolutely():
    assert (
        largest_error(torch.full((2,), 1e-7), torch.zeros(2))[1] < 1 < largest_error(torch.ones(2), torch.zeros(2))[1]
    )


def test_other_shapes_are_wrong():
    with pytest.raises(WrongResultError, match=r"shapes are \[\(2,\)\], but the reference's are \[\(3,\)\]"):
        largest_error(torch.ones(2), torch.ones(3))


def test_a_result_that_is_changed_in_place_is_compared_as_it_was(benchmark, entries):
    state = torch.zeros(4)

    def add_up() -> torch.Tensor:
        return state.add_(1)

    Duel(benchmark, CPU, rounds=1).check("", {REFERENCE: add_up, FASTMUM: lambda: torch.ones(4)})
    assert entries() == []


def test_everyone_runs_in_every_round_and_begins_in_turn():
    assert [list(rotated("abc", number)) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    calls: list[str] = []

    def runner(name: str):
        def run() -> torch.Tensor:
            calls.append(name)
            sleep(1.1 * ROUND_SECONDS)  # so long that a round calls it once
            return torch.ones(1)

        return run

    times = interleave({name: runner(name) for name in "abc"}, rounds=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(calls[6:]) == "abcbcacab"  # behind two calls of each to warm up
    assert all(seconds > 0 for values in times.values() for seconds in values)


def test_contestants_become_entries_and_pair_again(benchmark, entries):
    duel = Duel(benchmark, CPU, rounds=4)
    contestants = {REFERENCE: constant(1.0), COMPILED: constant(1.0), FASTMUM: constant(1.0)}
    duel("group", "thing", contestants, bytes=64)
    made = entries()
    assert [entry["extra_info"]["contestant"] for entry in made] == [REFERENCE, COMPILED, FASTMUM]
    assert {entry["group"] for entry in made} == {"group: thing"}
    assert len({entry["fullname"] for entry in made}) == 3
    assert all(entry["stats"]["rounds"] == 4 for entry in made)
    (result,) = results_of(made)
    assert (result.group, result.what, result.unit) == ("group", "thing", "s")
    assert result.info == {"bytes": 64, "error": 0.0}
    assert result.rounds == {e["extra_info"]["contestant"]: e["stats"]["data"] for e in made}


def test_other_units_keep_their_rounds_beside_the_seconds(benchmark, entries):
    peaks, seconds = {REFERENCE: [4e9, 5e9], FASTMUM: [2e9, 2e9]}, {REFERENCE: [1.0, 1.0], FASTMUM: [2.0, 2.0]}
    Duel(benchmark, CPU, rounds=1).record("memory", "peak", peaks, unit="bytes", seconds=seconds)
    (result,) = results_of(entries())
    assert result.rounds == peaks
    assert result.value(FASTMUM) == "2 GB"
    assert entries()[1]["stats"]["median"] == 2.0


def test_switched_off_nothing_is_registered():
    Duel(SimpleNamespace(disabled=True, _mode=None), CPU, 1).record("group", "thing", {REFERENCE: [1.0]})

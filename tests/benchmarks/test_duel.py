"""Duels: wrong results are not timed, contestants take turns, and each becomes an entry of pytest-benchmark."""

from functools import partial
from time import sleep
from types import SimpleNamespace

import pytest
import torch

from benchmarks.duel import ROUND_SECONDS, Duel, WrongResultError, interleave, largest_error
from benchmarks.results import COMPILED, FASTMUM, REFERENCE, results_of

CPU = torch.device("cpu")


@pytest.fixture
def entries(benchmark, request):
    """The entries that this test registers; removed from the session's table afterwards."""
    benchmark._mode = "used by a duel"
    session = request.config._benchmarksession
    before = len(session.benchmarks)
    if benchmark.disabled:
        pytest.skip("pytest-benchmark is disabled")
    yield lambda: [entry.as_dict() for entry in session.benchmarks[before:]]
    del session.benchmarks[before:]


def constant(value: float, dtype: torch.dtype = torch.float32):
    return lambda: torch.full((8,), value, dtype=dtype)


@pytest.mark.parametrize(("dtype", "wrong", "right"), [(torch.float32, 1e-4, 5e-6), (torch.bfloat16, 0.1, 0.008)])
def test_a_wrong_result_is_not_timed(benchmark, entries, dtype, wrong, right):
    duel = Duel(benchmark, CPU, rounds=1)
    duel.check("", {REFERENCE: constant(1.0, dtype), FASTMUM: constant(1 + right, dtype)})
    with pytest.raises(WrongResultError, match="thing: fastmum"):
        duel("group", "thing", {REFERENCE: constant(1.0, dtype), FASTMUM: constant(1 + wrong, dtype)})
    assert entries() == []
    state = torch.zeros(8)  # a reference may change its result in place
    duel.check("", {REFERENCE: lambda: state.add_(1), COMPILED: lambda: state.add_(1) - 1, FASTMUM: constant(1.0)})


def test_largest_error():
    good, bad = torch.ones(4), torch.ones(4) * 1.5
    error, of_tolerance = largest_error([good, bad, good.bfloat16()], [good, good, good.bfloat16() * 1.01])
    assert error == pytest.approx(0.5)
    assert of_tolerance > 1
    assert all(largest_error(torch.tensor([1.0, x]), torch.ones(2))[1] > 1 for x in (float("nan"), float("inf")))
    assert largest_error(torch.full((2,), 1e-7), torch.zeros(2))[1] < 1  # absolute where 0 is expected
    with pytest.raises(WrongResultError, match=r"\(2,\).*\(3,\)"):
        largest_error(torch.ones(2), torch.ones(3))


def test_contestants_take_turns():
    calls: list[str] = []

    def call(name: str) -> torch.Tensor:
        calls.append(name)
        sleep(1.1 * ROUND_SECONDS)  # one call per round
        return torch.ones(1)

    times = interleave({name: partial(call, name) for name in "abc"}, rounds=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(calls[6:]) == "abcbcacab"  # after two warm-up calls of each
    assert all(seconds > 0 for values in times.values() for seconds in values)


def test_contestants_become_entries_and_pair_again(benchmark, entries):
    contestants = {REFERENCE: constant(1.0), COMPILED: constant(1.0), FASTMUM: constant(1.0)}
    duel = Duel(benchmark, CPU, rounds=4)
    duel("group", "thing", contestants, bytes=64)
    made = entries()
    assert {entry["group"] for entry in made} == {"group: thing"}
    assert len({entry["fullname"] for entry in made}) == 3
    (result,) = results_of(made)
    assert (result.group, result.what, result.unit) == ("group", "thing", "s")
    assert result.info == {"bytes": 64, "error": 0.0}
    assert list(result.rounds) == [REFERENCE, COMPILED, FASTMUM]
    assert result.rounds == {e["extra_info"]["contestant"]: e["stats"]["data"] for e in made}
    assert all(len(rounds) == 4 for rounds in result.rounds.values())

    peaks, seconds = {REFERENCE: [4e9, 5e9], FASTMUM: [2e9, 2e9]}, {REFERENCE: [1.0, 1.0], FASTMUM: [2.0, 2.0]}
    duel.record("memory", "peak", peaks, unit="bytes", seconds=seconds)
    made = entries()[3:]
    (result,) = results_of(made)
    assert (result.rounds, result.value(FASTMUM)) == (peaks, "2 GB")
    assert made[1]["stats"]["median"] == 2.0
    # A disabled benchmark registers nothing.
    Duel(SimpleNamespace(disabled=True, _mode=None), CPU, 1).record("group", "thing", {REFERENCE: [1.0]})

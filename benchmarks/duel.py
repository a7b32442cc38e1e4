"""Compares the results of contestants, then times them in turn.

A contestant with a wrong result is not timed. Every round runs each contestant once, in rotating order, and ratios are
taken within a round, so that drift of the machine affects all alike. Each contestant is an entry of pytest-benchmark
whose data are its rounds in order; `benchmarks.results` pairs them again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.contestant import Clock
from benchmarks.results import COMPILED, FASTMUM, REFERENCE

if TYPE_CHECKING:  # not installed everywhere, and `interleave` needs no pytest
    from pytest_benchmark.fixture import BenchmarkFixture

# Largest |result - expected| / |expected| of two correct implementations that sum in different order.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROUND_SECONDS, MOST_CALLS = 0.03, 100  # a round repeats shorter calls, at most MOST_CALLS times
CACHE_BYTES = 256 << 20  # more than the second-level cache of any GPU

Results = Tensor | Sequence[Tensor]
Run = Callable[[], Results]


class WrongResultError(AssertionError):
    """A contestant's result differs from the reference's."""


def largest_error(results: Results, expected: Results) -> tuple[float, float]:
    """|result - expected| / |expected| of the worst tensor, and that over its tolerance.

    The tolerance is that of the coarser of the two dtypes. Non-finite results have an infinite error.
    """
    results, expected = ([x] if isinstance(x, Tensor) else list(x) for x in (results, expected))
    if [x.shape for x in results] != [x.shape for x in expected]:
        raise WrongResultError(f"shapes are {[tuple(x.shape) for x in results]}, but the reference's are "
                               f"{[tuple(x.shape) for x in expected]}")  # fmt: skip
    errors = []
    for x, y in zip(results, expected, strict=True):
        error = (x.double() - y.double()).norm().item() / (y.double().norm().item() or 1.0)
        error = error if error == error else float("inf")
        errors.append((error, error / max(TOLERANCE[x.dtype], TOLERANCE[y.dtype])))
    return max(errors, key=lambda pair: pair[1])


class Duel:
    """Compares, times and registers contestants.

    Args:
        benchmark: pytest-benchmark's fixture of the test.
        device: of the contestants.
        rounds: number of rounds.
    """

    def __init__(self, benchmark: BenchmarkFixture, device: torch.device, rounds: int) -> None:
        self._benchmark, self._device, self._rounds = benchmark, device, rounds

    def __call__(self, group: str, what: str, contestants: Mapping[str, Run], **info: Any) -> None:
        """Compare, time and register.

        Args:
            group, what: title and row in tables.
            contestants: by name, with `REFERENCE`; each call repeats the work and returns its results.
            info: for the JSON, such as `bytes` and `flops` of a call.

        Raises:
            WrongResultError: results differ by more than `TOLERANCE`.
        """
        error = self.check(what, contestants)
        self.record(group, what, interleave(contestants, self._rounds, self._device), error=error, **info)

    def check(self, what: str, contestants: Mapping[str, Run]) -> float:
        """The largest relative error of all contestants.

        Raises:
            WrongResultError: an error is above its tolerance.
        """
        expected = contestants[REFERENCE]()
        expected = [x.detach().clone() for x in ([expected] if isinstance(expected, Tensor) else expected)]
        worst = 0.0
        for name, run in contestants.items():
            if name == REFERENCE:
                continue
            error, of_tolerance = largest_error(run(), expected)
            if not of_tolerance <= 1:
                raise WrongResultError(
                    f"{what}: {name} differs from the reference by {error:.2e}, {of_tolerance:.1f} times the tolerance"
                )
            worst = max(worst, error)
        return worst

    def record(
        self, group: str, what: str, rounds: Mapping[str, list[float]], unit: str = "s",
        seconds: Mapping[str, list[float]] | None = None, **info: Any,
    ) -> None:  # fmt: skip
        """Register measurements, one entry of pytest-benchmark per contestant.

        Args:
            group, what: title and row in tables.
            rounds: by contestant, in order.
            unit: of the rounds, as in `Result`.
            seconds: for pytest-benchmark's own table if the unit is not seconds.
            info: for the JSON.
        """
        benchmark = self._benchmark
        benchmark._mode = "duel"  # pytest-benchmark warns of unused fixtures
        if benchmark.disabled:
            return
        for name, values in rounds.items():
            entry = copy(benchmark)  # the same node, options and session
            entry.name, entry.group = f"{what} ({name})", f"{group}: {what}"
            entry.fullname = f"{benchmark.fullname}::{group}::{what}::{name}"
            entry.extra_info = {"group": group, "what": what, "contestant": name, "unit": unit, **info}
            if unit != "s":
                entry.extra_info["rounds"] = values
            stats = entry._make_stats(iterations=1)
            for value in values if unit == "s" else (seconds or {})[name]:
                stats.update(value)


def interleave(
    contestants: Mapping[str, Run], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Seconds per call of each contestant in every round.

    Short calls are repeated within a round, equally often for all. On CUDA the time is the GPU's, and each call begins
    with a cold cache.
    """
    clock = Clock(device)
    for run in contestants.values():
        run()
    calls = _calls(contestants, clock)
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device) if torch.device(device).type == "cuda" else None
    times: dict[str, list[float]] = {name: [] for name in contestants}
    with no_collection():
        for number in range(rounds):
            for name in rotated(list(contestants), number):
                times[name].append(_time(contestants[name], calls, clock, cache))
    return times


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: the first of one round is the last of the next."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def _calls(contestants: Mapping[str, Run], clock: Clock) -> int:
    """Calls per round, so that the slowest contestant takes `ROUND_SECONDS`."""
    slowest = max(_time(run, 1, clock, None) for run in contestants.values())
    return min(MOST_CALLS, max(1, ceil(ROUND_SECONDS / max(slowest, 1e-9))))


def _time(run: Run, calls: int, clock: Clock, cache: Tensor | None) -> float:
    marks = []
    clock.wait()
    for _ in range(calls):
        if cache is not None:
            cache.zero_()
        begin = clock.mark()
        run()
        marks.append((begin, clock.mark()))
    clock.wait()
    return sum(clock.seconds(*pair) for pair in marks) / calls


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage before, and none during a measurement."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


__all__ = ["COMPILED", "FASTMUM", "REFERENCE", "Duel", "WrongResultError", "interleave", "largest_error", "rotated"]

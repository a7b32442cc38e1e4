"""Contestants that do the same: their results are compared, then they are timed by turns, round by round.

A wrong result has no speed. Every round runs each contestant once, in an order that rotates, so that all see the same
machine; a ratio is taken within a round. Each contestant is an entry of pytest-benchmark of its own, whose data are its
rounds in order; `benchmarks.results` pairs them again, here and from a file.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from math import ceil
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.clock import Clock
from benchmarks.results import COMPILED, FASTMUM, REFERENCE

# Largest |result - expected| / |expected| of two correct implementations that add up in another order.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROUND_SECONDS, MOST_CALLS = 0.03, 100  # a round repeats what is shorter, at most so often
CACHE_BYTES = 256 << 20  # more than the second-level cache of any GPU

Results = Tensor | Sequence[Tensor]
Run = Callable[[], Results]


class WrongResultError(AssertionError):
    """A contestant that does not compute what the reference does."""


def largest_error(results: Results, expected: Results) -> tuple[float, float]:
    """Of the worst tensor: |result - expected| / |expected|, and that over its tolerance.

    A tensor's tolerance is that of the coarser of the two dtypes. What is not finite is infinitely wrong.
    """
    results, expected = ([x] if isinstance(x, Tensor) else list(x) for x in (results, expected))
    if [x.shape for x in results] != [x.shape for x in expected]:
        raise WrongResultError(f"shapes are {[tuple(x.shape) for x in results]}, but the reference's are "
                               f"{[tuple(x.shape) for x in expected]}")  # fmt: skip
    errors = []
    for x, y in zip(results, expected, strict=True):
        size = y.double().norm().item()
        error = (x.double() - y.double()).norm().item() / (size or 1.0)
        error = error if error == error else float("inf")
        errors.append((error, error / max(TOLERANCE[x.dtype], TOLERANCE[y.dtype])))
    return max(errors, key=lambda pair: pair[1])


class Duel:
    """Compares, times and registers contestants.

    Args:
        benchmark: pytest-benchmark's fixture of the test.
        device: that the contestants work on.
        rounds: of a duel.
    """

    def __init__(self, benchmark: BenchmarkFixture, device: torch.device, rounds: int) -> None:
        self._benchmark, self._device, self._rounds = benchmark, device, rounds

    def __call__(self, group: str, what: str, contestants: Mapping[str, Run], **info: Any) -> None:
        """A duel.

        Args:
            group, what: under which it stands in the tables.
            contestants: by name, `REFERENCE` among them. Each call does the work once more and returns its results.
            info: for the JSON, such as `bytes` and `flops` of a call.

        Raises:
            WrongResultError: results differ by more than `TOLERANCE`.
        """
        error = self.check(what, contestants)
        times = interleave(contestants, self._rounds, self._device)
        self.record(group, what, times, error=error, **info)

    def check(self, what: str, contestants: Mapping[str, Run]) -> float:
        """Run everyone once; the largest relative error.

        Raises:
            WrongResultError: a result is wrong.
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
                    f"{what}: {name} differs from the reference by {error:.2e}, {of_tolerance:.1f} times what is "
                    "tolerated; a wrong result has no speed"
                )
            worst = max(worst, error)
        return worst

    def record(
        self, group: str, what: str, rounds: Mapping[str, list[float]], unit: str = "s",
        seconds: Mapping[str, list[float]] | None = None, **info: Any,
    ) -> None:  # fmt: skip
        """Register what was measured, an entry of pytest-benchmark for every contestant.

        Args:
            group, what: as above.
            rounds: by contestant, in the order of the rounds.
            unit: of the rounds, as in `Result`; "s" is seconds.
            seconds: what pytest-benchmark is given where the unit is another.
            info: for the JSON.
        """
        benchmark = self._benchmark
        benchmark._mode = "duel"  # used: pytest-benchmark warns of fixtures that are not
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
    """Seconds of a call of each contestant in every round, by turns.

    What is short is called many times in a round, equally often by all, after two calls that warm it up. On CUDA the
    time is the GPU's, each call begins with a cold cache, and launches are hidden where they can be.
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


def rotated(names: Sequence[str], number: int) -> Iterable[str]:
    """The order of a round: each begins in turn."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def _calls(contestants: Mapping[str, Run], clock: Clock) -> int:
    """How often a round calls each: so often that the slowest takes long enough."""
    slowest = 0.0
    for run in contestants.values():
        clock.wait()
        begin = clock.mark()
        run()
        end = clock.mark()
        clock.wait()
        slowest = max(slowest, clock.seconds(begin, end))
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
    """Python's garbage is collected before, and not in the middle of a round."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


__all__ = ["COMPILED", "FASTMUM", "REFERENCE", "Duel", "WrongResultError", "interleave", "largest_error", "rotated"]

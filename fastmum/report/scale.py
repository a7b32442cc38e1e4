"""Axes: from numbers to pixels, where the ticks are, and how numbers are written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

STEPS = (1, 2, 5, 10)  # of ticks, times a power of ten
MAX_LOG_TICKS = 6


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` onto pixels from `start` to `end`; a logarithmic one only positive values."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = (
            (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round values within the scale."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high, count)


def scale_for(values: Iterable[float], start: float, end: float, from_zero: bool = False, log: bool = False) -> Scale:
    """A scale that shows all values, with a little room around them, and is never empty.

    Args:
        values: to show.
        start, end: pixels.
        from_zero: whether it begins at 0.
        log: whether it is logarithmic; 0 and what is below it is then not shown.
    """
    shown = [value for value in values if value > 0 or not log]
    low, high = (min(shown), max(shown)) if shown else (1.0, 1.0)
    if log:
        room = max((high / low) ** 0.04, 1.05)
        return Scale(low / room, high * room, start, end, log=True)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    if from_zero:
        return Scale(min(0.0, low), max(high + room, 1e-12), start, end)
    return Scale(low - room, high + room, start, end)


def write(value: float, percent: bool = False, digits: int = 3) -> str:
    """A number for people: 12,345, 0.0812, 1.5M, 4.2 %.

    Args:
        value: the number.
        percent: whether it is a share.
        digits: that count.
    """
    if percent:
        return f"{write(100 * value, digits=digits)} %"
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if size >= unit:
            return f"{value / unit:.{digits}g}{name}"
    if size >= 1000 or value == round(value):
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.{digits}g}".replace("e-0", "e-")
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}"


def write_ticks(ticks: list[float], percent: bool = False) -> list[str]:
    """Labels of ticks, all with the digits that the finest step needs."""
    shown = [100 * tick for tick in ticks] if percent else ticks
    unit, name = next(
        ((u, n) for u, n in ((1e6, "M"), (1e3, "k")) if max(map(abs, shown), default=0) >= 10 * u), (1, "")
    )
    shown = [tick / unit for tick in shown]
    largest = max(map(abs, shown), default=0)
    if 0 < largest < 1e-2:
        unit = 10.0 ** math.floor(math.log10(largest))
        name = f"e{math.floor(math.log10(largest))}"
        shown = [tick / unit for tick in shown]
    steps = [abs(b - a) for a, b in itertools.pairwise(shown)] or [1.0]
    decimals = max(0, -math.floor(math.log10(min(steps)) + 1e-9))
    return [f"{tick:,.{decimals}f}{name if tick else ''}{' %' if percent else ''}" for tick in shown]


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    power = 10 ** math.floor(math.log10((high - low) / count))
    step = next(s * power for s in STEPS if s * power * count >= high - low)
    first = math.ceil(low / step - 1e-9)
    # Multiplied, not added up, so that 0.3 is not 0.30000000000000004 times something.
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(ticks) <= MAX_LOG_TICKS:
            return ticks
    return ticks[:: math.ceil(len(ticks) / MAX_LOG_TICKS)]

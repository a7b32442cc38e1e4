"""Results of duels: entries of pytest-benchmark paired again, ratios by round, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, NamedTuple

REFERENCE, COMPILED, FASTMUM = "reference", "compiled", "fastmum"
FRAMES_A_SECOND = "frames/s"  # the only unit of which more is better
MIN_FOR_QUARTILES = 4  # rounds
SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")),
    "bytes/s": ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s")),
    "FLOP/s": ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")),
}
HEADINGS = ("", REFERENCE, COMPILED, FASTMUM, "reference / fastmum", "compiled / fastmum", "rounds", "")


class Ratio(NamedTuple):
    """Speed-up: median of the rounds, and quartiles, or minimum and maximum of fewer than 4 rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass
class Result:
    """One duel.

    Args:
        rounds: measured values by contestant, in order.
        info: more facts, such as "bytes", "flops", "peak" (FLOP/s of the device) and "note".
    """

    group: str
    what: str
    unit: str = "s"
    rounds: dict[str, list[float]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def ratio(self, over: str = REFERENCE, of: str = FASTMUM) -> Ratio | None:
        """Speed-up of `of` over `over`, round by round; None if one of them is missing."""
        if over not in self.rounds or of not in self.rounds:
            return None
        pair = (of, over) if self.unit == FRAMES_A_SECOND else (over, of)
        ratios = [a / b for a, b in zip(*(self.rounds[name] for name in pair), strict=True)]
        low, high = min(ratios), max(ratios)
        if len(ratios) >= MIN_FOR_QUARTILES:
            low, _, high = quantiles(ratios, n=4, method="inclusive")
        return Ratio(median(ratios), low, high)

    @property
    def spread(self) -> str:
        """Meaning of the brackets after a ratio, and the number of rounds."""
        count = max(map(len, self.rounds.values()))
        return f"{'quartiles' if count >= MIN_FOR_QUARTILES else 'least to most'} of {count}"

    def value(self, name: str) -> str:
        """A contestant's median with its unit, "" if it is missing."""
        return write(median(self.rounds[name]), self.unit) if name in self.rounds else ""

    @property
    def note(self) -> str:
        """Bytes and operations a second of fastmum, its share of the device's peak, and the note."""
        if FASTMUM not in self.rounds:
            return ""
        seconds, notes = median(self.rounds[FASTMUM]), []
        if "bytes" in self.info:
            notes.append(write(self.info["bytes"] / seconds, "bytes/s"))
        if "flops" in self.info:
            rate = self.info["flops"] / seconds
            notes.append(write(rate, "FLOP/s"))
            if self.info.get("peak"):
                notes.append(f"MFU {rate / self.info['peak']:.1%}")
        return ", ".join([*notes, *([self.info["note"]] if "note" in self.info else [])])


def write(value: float, unit: str) -> str:
    """A number with the largest prefix of its unit that leaves it at least 1."""
    scales = SCALES.get(unit, ((1.0, unit),))
    scale, name = next((pair for pair in scales if abs(value) >= pair[0]), scales[-1])
    return f"{value / scale:.3g} {name}"


def results_of(entries: Iterable[Mapping[str, Any]]) -> list[Result]:
    """Duels from entries as in `--benchmark-json`; entries of other benchmarks are skipped.

    Raises:
        ValueError: two duels have the same name.
    """
    results: dict[tuple[str, str], Result] = {}
    for entry in entries:
        info = dict(entry["extra_info"])
        if "contestant" not in info:
            continue
        group, what, name, unit = (info.pop(key) for key in ("group", "what", "contestant", "unit"))
        result = results.setdefault((group, what), Result(group, what, unit))
        if name in result.rounds:
            raise ValueError(f"'{group}: {what}' is there twice for {name}")
        result.rounds[name] = info.pop("rounds", None) or entry["stats"]["data"]
        result.info |= info
    return list(results.values())


def grouped(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by group, in order of appearance."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return groups


def rows(results: Iterable[Result]) -> list[list[str]]:
    """Cells under `HEADINGS`: medians, ratios with their spread, kind of spread, note."""
    return [
        [
            result.what,
            *(result.value(name) for name in (REFERENCE, COMPILED, FASTMUM)),
            *(str(result.ratio(over) or "") for over in (REFERENCE, COMPILED)),
            result.spread,
            result.note,
        ]
        for result in results
    ]


def text_table(results: Iterable[Result]) -> list[str]:
    """Lines for a terminal, group by group."""
    lines: list[str] = []
    for group, some in grouped(results).items():
        cells = [[group, *HEADINGS[1:]], *rows(some)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            padded = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True))]
            lines.append("  ".join([*padded, row[-1]]).rstrip())
        lines.append("")
    return lines[:-1]

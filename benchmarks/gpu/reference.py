"""The step of fastmum against the released model's, eager and compiled, in turn, with the operators of one of each."""

from __future__ import annotations

import sys
from statistics import median

from benchmarks.gpu.measure import this_device
from benchmarks.gpu.record import Record, stage_main
from benchmarks.gpu.step import SMALL
from benchmarks.results import FASTMUM
from benchmarks.step import Comparison

FRAMES, VIEWS, ROUNDS = 96, 12, 10
PROFILE_LINES = 30  # of each table, in the page


def measure(record: Record, small: bool, words: list[str]) -> None:
    """Phases of every contestant; losses are compared first. The compiled reference comes last: it compiles long."""
    profiled: set[str] = set()
    for compiled in (False,) if small else (False, True):
        compare(record, small, words, compiled, profiled)


def compare(record: Record, small: bool, words: list[str], compiled: bool, profiled: set[str]) -> None:
    """Time all contestants, and profile those that are not in `profiled`."""
    frames, views, rounds = (8, 4, 2) if small else (FRAMES, VIEWS, ROUNDS)
    settings = [f"train.device={this_device().type}", *(SMALL if small else ["data.views=[2,24]"]), *words]
    comparison = Comparison(frames, views, settings, compiled=compiled)
    try:
        comparison.check()
        comparison.run(rounds)
        steps = {}
        for name, contestant in comparison.contestants.items():
            ms = contestant.milliseconds(median)
            record.row(contestant=name, **{f"{phase}_ms": value for phase, value in ms.items()})
            steps[name] = ms["step"]
        ratios = (f"{name} / fastmum {ms / steps[FASTMUM]:.2f}" for name, ms in steps.items() if name != FASTMUM)
        record.headline = f"{steps[FASTMUM]:.4g} ms a step; {', '.join(ratios)}"
        record.write()
        for name in comparison.contestants.keys() - profiled:
            table = comparison.contestants[name].profile()
            record.file.with_name(f"profile-{name}.txt").write_text(table, encoding="utf-8")
            lines = "\n".join(table.splitlines()[:PROFILE_LINES])
            title = f"<summary>Operators: {name}</summary>"
            record.notes.append(f"<details>{title}\n\n```\n{lines}\n```\n\n</details>")
            record.write()
            profiled.add(name)
    finally:
        comparison.close()


if __name__ == "__main__":
    sys.exit(stage_main(__doc__, measure))

"""metrics.jsonl, written as a run goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastmum.engine.metrics import end_of_step, metrics_line
from fastmum.engine.telemetry.appender import Appender


class Lines:
    """Writes a line a log step; those after the step that a run resumes from are dropped first.

    Args:
        path: of the file.
        step: steps done by the checkpoint that the run goes on from, 0 for a new run.
    """

    def __init__(self, path: Path, step: int) -> None:
        # Lines are in the order of their steps: one cut, which needs no room and is never half done, drops them.
        self._file = Appender(path, end_of_step(path, step))

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """One line."""
        self._file.append(metrics_line(step, values))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

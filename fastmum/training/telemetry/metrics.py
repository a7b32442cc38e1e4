"""metrics.jsonl: one JSON object a log step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastmum.training.telemetry.appender import Appender


class Metrics:
    """Writes the lines; what lies after the step that a run resumes from is dropped first.

    Args:
        path: of the file.
        step: steps done by the checkpoint that the run goes on from, 0 for a new run.
    """

    def __init__(self, path: Path, step: int) -> None:
        # Lines are in the order of their steps: one cut, which needs no room and is never half done, drops them.
        kept = (end for end, record in _records(path) if record["step"] <= step)
        self._file = Appender(path, end=max(kept, default=0))

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """One line. Strict JSON: what is not a finite number is null."""
        line = json.dumps({"step": step, **{name: finite(value) for name, value in values.items()}}, allow_nan=False)
        self._file.append(line.encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def finite(value: float | None) -> float | None:
    """The number, or None where it is none."""
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, of none that is not there; a last line cut short by a crash is left out."""
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines, each with the place in bytes at which it ends."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # also bytes that are no text
            return
        if not line.endswith(b"\n"):
            return
        end += len(line)
        yield end, record

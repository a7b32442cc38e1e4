"""The lines of metrics.jsonl: one JSON object a log step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def metrics_line(step: int, values: Mapping[str, float | None]) -> bytes:
    """A line. Strict JSON: what is not a finite number is null."""
    content = {"step": step, **{name: finite(value) for name, value in values.items()}}
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def finite(value: float | None) -> float | None:
    """The number, or None where it is none."""
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, of none that is not there; a last line cut short by a crash is left out."""
    return [record for _, record in _records(path)]


def end_of_step(path: Path, step: int) -> int:
    """The place in bytes at which the lines up to a step end."""
    return max((end for end, record in _records(path) if record["step"] <= step), default=0)


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

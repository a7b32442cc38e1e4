"""What lies in the folder of a run, read for a page about it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fastmum.engine.metrics import read_metrics
from fastmum.engine.rundir import RunDir

Point = tuple[float, float]


class ReportError(RuntimeError):
    """A run that cannot be reported on; the message is one line for the user."""


@dataclass(frozen=True)
class Kept:
    """A checkpoint: steps done, its name, bytes, and when it was written."""

    step: int
    name: str
    size: int
    written: datetime


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it.

    Args:
        root: the folder.
        label: what it is called on the page.
        records: of metrics.jsonl.
        config: the text of config.yaml; empty where there is none.
        steps: train.steps; None where the configuration does not say.
        pictures: of reconstructions, by steps done.
        checkpoints: by steps done.
        bad_frames: lines of bad_frames.log.
        written: when the last line of metrics.jsonl was.
    """

    root: Path
    label: str
    records: list[dict[str, Any]]
    config: str
    steps: int | None
    pictures: dict[int, Path]
    checkpoints: list[Kept]
    bad_frames: list[str]
    written: datetime

    @property
    def step(self) -> int:
        """Steps done at the last line."""
        return self.records[-1]["step"]

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.steps is not None and self.step >= self.steps

    def series(self, name: str, x: str = "step") -> list[Point]:
        """The points (x, value) of a curve, of the lines that have both."""
        pairs = ((record.get(x), record.get(name)) for record in self.records)
        return [(a, b) for a, b in pairs if _is_number(a) and _is_number(b)]

    def last(self, name: str) -> float | None:
        """The newest value of a curve; None where there is none."""
        points = self.series(name)
        return points[-1][1] if points else None

    def names(self, prefix: str) -> list[str]:
        """Names of curves that begin with `prefix`, in natural order."""
        found = {name for record in self.records for name in record if name.startswith(prefix)}
        return sorted(found, key=lambda name: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", name)])


def read_run(root: Path) -> Run:
    """Read the folder of a run.

    Raises:
        ReportError: it is not there, cannot be read, or has no metrics yet.
    """
    try:
        return _read(RunDir(root))
    except OSError as error:
        raise ReportError(f"'{error.filename or root}' cannot be read ({error.strerror})") from None


def with_labels(runs: list[Run]) -> list[Run]:
    """The runs, those of one name called by their folders instead."""
    names = [run.label for run in runs]
    return [dataclasses.replace(run, label=str(run.root)) if names.count(run.label) > 1 else run for run in runs]


def _read(run: RunDir) -> Run:
    root = run.root
    if not root.is_dir():
        raise ReportError(f"there is no run '{root}'")
    if not run.metrics.is_file():
        raise ReportError(f"'{root}' is no run: it has no {run.metrics.name}")
    records = [record for record in read_metrics(run.metrics) if isinstance(record.get("step"), int)]
    if not records:
        raise ReportError(f"'{run.metrics}' has no line yet; the first comes after train.log_every steps")
    config = run.config.read_text(encoding="utf-8", errors="replace") if run.config.is_file() else ""
    bad = run.bad_frames.read_text(encoding="utf-8", errors="replace") if run.bad_frames.is_file() else ""
    name, steps = _name_and_steps(config)
    return Run(
        root=root,
        label=name or root.resolve().name,
        records=records,
        config=config,
        steps=steps,
        pictures=_pictures(run),
        checkpoints=_checkpoints(run.checkpoints),
        bad_frames=bad.splitlines(),
        written=_time(run.metrics),
    )


def _name_and_steps(config: str) -> tuple[str | None, int | None]:
    # Plain YAML, not a checked configuration: the page also shows runs of other versions.
    try:
        sections = yaml.safe_load(config)
        return str(sections["run"]["name"]), int(sections["train"]["steps"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return None, None


def _pictures(run: RunDir) -> dict[int, Path]:
    found = {
        int(m[1]): path
        for path in run.picture(0).parent.glob("*")
        if (m := re.fullmatch(r"step_(\d+)\.png", path.name))
    }
    return dict(sorted(found.items()))


def _checkpoints(folder: Path) -> list[Kept]:
    kept = []
    for path in folder.glob("step_*"):
        found = re.fullmatch(r"step_(\d+)(\.\w+)?", path.name)
        # A run that goes on removes old ones meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if found:
                files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
                kept.append(Kept(int(found[1]), path.name, sum(file.stat().st_size for file in files), _time(path)))
    return sorted(kept, key=lambda checkpoint: checkpoint.step)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _time(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)

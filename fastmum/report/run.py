"""Read the folder of a run: metrics, configuration, pictures, checkpoints and bad frames."""

import contextlib
import dataclasses
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import yaml

from fastmum.engine.rundir import RunDir, read_metrics
from fastmum.errors import FastmumError

Point = tuple[float, float]
VIEWS = "loss/views_"  # prefix of losses; the number of views follows
LARGEST = 1e300  # of numbers that are drawn


class Checkpoint(NamedTuple):
    """A checkpoint in the folder of a run."""

    step: int
    name: str
    size: int  # bytes
    written: datetime


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder."""

    root: Path
    label: str
    records: list[dict[str, float]]  # lines of metrics.jsonl, at least one; finite numbers only
    config: str  # text of config.yaml, "" without that file
    steps: int | None  # train.steps, if the configuration has it
    pictures: dict[int, Path]  # reconstructions by step
    checkpoints: list[Checkpoint]  # ascending
    bad_frames: list[str]  # lines of bad_frames.log
    written: datetime  # when metrics.jsonl was

    @property
    def step(self) -> int:
        """Steps done at the last line of the metrics."""
        return int(self.records[-1]["step"])

    def series(self, name: str, x: str = "step") -> list[Point]:
        """Points (x, value) of the records that have both."""
        return [(record[x], record[name]) for record in self.records if x in record and name in record]

    def last(self, name: str) -> float | None:
        """The newest value of a metric, None if it has none."""
        points = self.series(name)
        return points[-1][1] if points else None

    def names(self, prefix: str) -> list[str]:
        """Metrics that start with `prefix`, without it; sorted."""
        found = {name.removeprefix(prefix) for record in self.records for name in record if name.startswith(prefix)}
        return sorted(found)

    def views(self) -> list[int]:
        """Numbers of views that have a loss, ascending."""
        return sorted(int(name) for name in self.names(VIEWS) if re.fullmatch(r"[1-9][0-9]{0,5}", name))


def read_run(root: Path) -> Run:
    """Read the folder of a run; a `FastmumError` if it is missing, unreadable or has no metrics yet."""
    paths = RunDir(root)
    try:
        if not root.is_dir():
            raise FastmumError(f"there is no run '{root}'")
        if not paths.metrics.is_file():
            raise FastmumError(f"'{root}' is no run: it has no {paths.metrics.name}")
        records = [
            {key: value for key, value in line.items() if isinstance(value, int | float) and abs(value) <= LARGEST}
            for line in read_metrics(paths.metrics)
            if isinstance(line, dict) and isinstance(line.get("step"), int) and abs(line["step"]) <= LARGEST
        ]
        if not records:
            raise FastmumError(f"'{paths.metrics}' has no line yet; the first comes after train.log_every steps")
        config, bad_frames = (
            path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            for path in (paths.config, paths.bad_frames)
        )
        try:  # plain YAML instead of the schema, so that runs of other versions can be shown
            sections = yaml.safe_load(config)
            name, steps = str(sections["run"]["name"]), int(sections["train"]["steps"])
        except Exception:  # YAML that is damaged raises any error
            name, steps = root.resolve().name, None
        files = paths.picture(0).parent.glob("*")
        pictures = {
            int(found[1]): file
            for file in files
            if (found := re.fullmatch(r"step_(\d+)\.png", file.name)) and file.is_file()
        }
        checkpoints, written = _checkpoints(paths.checkpoints), _time(paths.metrics)
    except OSError as error:
        raise FastmumError(f"'{error.filename or root}' cannot be read ({error.strerror})") from None
    except (ValueError, OverflowError, RecursionError) as error:  # times, or lines of metrics
        raise FastmumError(f"the run '{root}' cannot be read ({error}); restore or remove the damaged file") from None
    pictures = dict(sorted(pictures.items()))
    return Run(root, name, records, config, steps, pictures, checkpoints, bad_frames.splitlines(), written)


def distinct_labels(runs: list[Run]) -> list[Run]:
    """The runs; those that share a name are labelled by their folders instead."""
    names = [run.label for run in runs]
    return [dataclasses.replace(run, label=str(run.root)) if names.count(run.label) > 1 else run for run in runs]


def _checkpoints(folder: Path) -> list[Checkpoint]:
    found = []
    for path in folder.glob("step_*"):
        if match := re.fullmatch(r"step_(\d+)(\.\w+)?", path.name):
            with contextlib.suppress(FileNotFoundError):  # a run in progress deletes old checkpoints
                files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
                size = sum(file.stat().st_size for file in files)
                found.append(Checkpoint(int(match[1]), path.name, size, _time(path)))
    return sorted(found)


def _time(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)

"""The folder of a run, and the lines of its metrics.jsonl."""

import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class RunDir:
    """Paths of the files that a run writes into the folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"  # resolved
        self.metrics = root / "metrics.jsonl"  # one JSON object per log step
        self.bad_frames = root / "bad_frames.log"  # a line per frame that cannot be decoded
        self.checkpoints = root / "checkpoints"
        self.tensorboard = root / "tensorboard"
        self.wandb_id = root / "wandb_id"  # id of the run in Weights & Biases
        self.profile = root / "profile"  # traces of `profile.steps`
        self.newest_picture = root / "reconstruction.png"

    def picture(self, step: int, name: str = "reconstruction") -> Path:
        """A picture after `step` steps; the name of reconstructions is left out."""
        prefix = "step" if name == "reconstruction" else name
        return self.root / "pictures" / f"{prefix}_{step:07d}.png"

    def set_aside(self) -> None:
        """Rename the folder, if it holds a run, to the next free `<name>.old-<n>`."""
        if not self.config.exists():
            return
        names = (self.root.with_name(f"{self.root.name}.old-{number}") for number in itertools.count(1))
        old = next(name for name in names if not name.exists())
        self.root.rename(old)
        log.info("the run in %s was renamed to %s", self.root, old)


def metrics_line(step: int, values: Mapping[str, float | None]) -> bytes:
    """A line of strict JSON: non-finite values are null."""
    content = {"step": step, **{name: finite(value) for name, value in values.items()}}
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def finite(value: float | None) -> float | None:
    """The value as a Python number, None if it is not finite."""
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last line cut short by a crash; none if the file is missing."""
    return [record for _, record in _records(path)]


def end_of_step(path: Path, step: int) -> int:
    """Offset in bytes after the lines of the first `step` steps."""
    return max((end for end, record in _records(path) if record["step"] <= step), default=0)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines, each with the offset of its end."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # also of bytes that are not UTF-8
            return
        if not line.endswith(b"\n"):
            return
        end += len(line)
        yield end, record

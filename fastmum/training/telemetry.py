"""What a run tells: a line of metrics.jsonl and TensorBoard at every log step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from fastmum.training.rundir import RunDir


class Telemetry:
    """Writes metrics; a resumed run first drops what lies after the step that it resumes from.

    Args:
        run: the folder.
        step: steps done by the checkpoint that the run goes on from, 0 for a new run.
    """

    def __init__(self, run: RunDir, step: int) -> None:
        self._run = run
        _drop_after(run.metrics, step)
        self._metrics = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board = SummaryWriter(str(run.tensorboard), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line: the number of steps done, and the values."""
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, picture: Image.Image) -> None:
        """A reconstruction, as a file of its own, as the run's newest and for TensorBoard."""
        for path in (self._run.picture(step), self._run.newest_picture):
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
        self._board.add_image("reconstruction", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the files."""
        self._metrics.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _drop_after(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(partial, path)  # a crash here must not lose the history

"""Everything that a run tells, in one call a log step."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from fastmum.config import Config
from fastmum.engine.rundir import RunDir
from fastmum.engine.telemetry.board import Board
from fastmum.engine.telemetry.lines import Lines
from fastmum.engine.telemetry.weights_and_biases import WeightsAndBiases

log = logging.getLogger(__name__)


class Telemetry:
    """Writes metrics and pictures; a resumed run first drops what lies after the step that it resumes from.

    No failure to write stops training: a full disk is one warning a file. Lines wait in memory until there is room
    again, pictures are left out.

    Args:
        run: the folder.
        step: steps done by the checkpoint that the run goes on from, 0 for a new run.
        config: of the run; None: no Weights & Biases.

    Raises:
        ConfigError: `telemetry.wandb` is set, but its package is not installed.
    """

    def __init__(self, run: RunDir, step: int, config: Config | None = None) -> None:
        self._run = run
        self._pictures_fail = False
        project = config.telemetry.wandb if config else None
        services = [WeightsAndBiases(project, run, config)] if project else []  # first: nothing is written if it raises
        self._sinks: list[Lines | Board | WeightsAndBiases] = [
            Lines(run.metrics, step),
            Board(run, step),
            *services,
        ]

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """One line: the number of steps done, and the values.

        Args:
            step: steps done.
            values: numbers by name. None, and what is not finite, is null in metrics.jsonl and no point elsewhere.
        """
        for sink in self._sinks:
            sink.log(step, values)

    def picture(self, step: int, picture: Image.Image) -> None:
        """A reconstruction, as a file of its own, as the run's newest and for the services."""
        content = io.BytesIO()
        picture.save(content, "PNG")
        for path in (self._run.picture(step), self._run.newest_picture):
            self._save(path, content.getvalue())
        for sink in self._sinks:
            if not isinstance(sink, Lines):
                sink.picture(step, picture)

    def close(self) -> None:
        """Flush and close the files."""
        for sink in self._sinks:
            sink.close()

    def _save(self, path: Path, content: bytes) -> None:
        partial = path.with_name(f"partial_{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            os.replace(partial, path)  # the picture before stays until this one is whole
        except OSError as error:
            if not self._pictures_fail:
                log.warning("%s cannot be written (%s); training goes on", path, error.strerror)
            self._pictures_fail = True
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        else:
            self._pictures_fail = False

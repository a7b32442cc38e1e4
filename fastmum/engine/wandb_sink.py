"""Metrics and pictures to Weights & Biases."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from fastmum.config.schema import ConfigError
from fastmum.engine.rundir import RunDir

log = logging.getLogger(__name__)

# Seconds that the service may block a run at its start and at its end, where a preempted run has little time left.
# Unsent data stay in the run's folder for `wandb sync`.
INIT_TIMEOUT = 20
FINISH_TIMEOUT = 20


class WandbSink:
    """A run of Weights & Biases, which a resumed run continues; its id is kept in the run's folder.

    Nothing is sent after the first failure, which is a warning.

    Raises:
        ConfigError: the package `wandb` is not installed.
    """

    def __init__(self, project: str, run: RunDir, name: str, config: Mapping[str, Any] | None) -> None:
        try:
            import wandb  # an extra
        except ImportError:
            raise ConfigError(
                f"telemetry.wandb is '{project}', but the package wandb is not installed: pip install 'fastmum[wandb]'"
            ) from None
        self._wandb = wandb
        self._run: Any = None

        def init() -> None:
            if not run.wandb_id.exists():
                run.root.mkdir(parents=True, exist_ok=True)
                run.wandb_id.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
            self._run = wandb.init(
                project=project,
                name=name,
                id=run.wandb_id.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(run.root),
                settings=wandb.Settings(init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT),
                config=dict(config or {}),
            )

        self._attempt(init)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to every curve. The service keeps its own of the steps that a resumed run repeats."""
        self._send(step, lambda: dict(values))

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Add a picture."""
        self._send(step, lambda: {name: self._wandb.Image(picture)})

    def close(self) -> None:
        """Wait until everything is sent, at most `FINISH_TIMEOUT`."""
        if self._run is not None:
            self._attempt(self._run.finish)

    def _send(self, step: int, content: Callable[[], dict[str, Any]]) -> None:
        run = self._run
        if run is not None and step >= run.starting_step:
            self._attempt(lambda: run.log(content(), step=step))

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # training continues whatever the service or its client raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("Weights & Biases is not used from here on: %s", reason)
            self._run = None

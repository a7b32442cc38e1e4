"""Weights & Biases: the same numbers and pictures, in a project of that service."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

from fastmum.config import Config, ConfigError
from fastmum.engine.metrics import finite
from fastmum.engine.rundir import RunDir

log = logging.getLogger(__name__)

# Seconds that the service may hold up a run at its start, and at its end, where a preempted one has little time left.
# What was not sent stays in the run's folder for `wandb sync`.
INIT_TIMEOUT = 20
FINISH_TIMEOUT = 20


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run goes on with.

    A failure there is a warning; after the first one nothing more is sent.

    Args:
        project: of the service.
        run: the folder; it keeps which run it is.
        config: of the run.

    Raises:
        ConfigError: the package `wandb` is not installed.
    """

    def __init__(self, project: str, run: RunDir, config: Config) -> None:
        try:
            import wandb  # only where it is asked for: it is an extra
        except ImportError:
            raise ConfigError(
                f"telemetry.wandb is '{project}', but the package wandb is not installed: pip install 'fastmum[wandb]'"
            ) from None
        self._wandb, self._run = wandb, None
        self._attempt(lambda: self._begin(project, run, config))

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """A point of every curve that has one. Of steps that a resumed run repeats, the service keeps those it has."""
        self._send(step, {name: value for name, value in values.items() if finite(value) is not None})

    def picture(self, step: int, picture: Image.Image) -> None:
        """A reconstruction."""
        self._send(step, lambda: {"reconstruction": self._wandb.Image(picture)})

    def close(self) -> None:
        """Wait until everything is sent, or the service says that it cannot be."""
        if self._run is not None:
            self._attempt(self._run.finish)

    def _begin(self, project: str, run: RunDir, config: Config) -> None:
        if not run.wandb_id.exists():
            run.root.mkdir(parents=True, exist_ok=True)
            run.wandb_id.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        self._run = self._wandb.init(
            project=project,
            name=config.run.name,
            id=run.wandb_id.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run.root),
            settings=self._wandb.Settings(init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT),
            config=OmegaConf.to_container(OmegaConf.structured(config), resolve=True),
        )

    def _send(self, step: int, content: dict[str, Any] | Callable[[], dict[str, Any]]) -> None:
        run = self._run
        if run is not None and step >= run.starting_step:
            self._attempt(lambda: run.log(content() if callable(content) else content, step=step))

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever the service or its client does, training goes on
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("Weights & Biases is left out from here on: %s", reason)
            self._run = None

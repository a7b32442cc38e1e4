"""The folder of a run: what lies where, and what becomes of an older run in it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunDir:
    """Paths of everything that a run writes."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a log step."""
        return self.root / "metrics.jsonl"

    @property
    def bad_frames(self) -> Path:
        """A line for each frame that cannot be decoded."""
        return self.root / "bad_frames.log"

    @property
    def checkpoints(self) -> Path:
        """Folder of the newest checkpoints."""
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder for TensorBoard."""
        return self.root / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        """Which run of Weights & Biases this one is."""
        return self.root / "wandb_id"

    @property
    def profile(self) -> Path:
        """Folder of the traces that `profile.steps` asks for."""
        return self.root / "profile"

    @property
    def newest_picture(self) -> Path:
        """The newest reconstruction; at the end, that of the trained model."""
        return self.root / "reconstruction.png"

    def picture(self, step: int) -> Path:
        """The reconstruction after `step` steps."""
        return self.root / "pictures" / f"step_{step:07d}.png"

    def set_aside(self) -> None:
        """Rename the folder, if it holds a run, to the next free `<name>.old-<n>`."""
        if not self.config.exists():
            return
        number = 1
        while (old := self.root.with_name(f"{self.root.name}.old-{number}")).exists():
            number += 1
        self.root.rename(old)
        log.info("the run in %s was set aside as %s", self.root, old)

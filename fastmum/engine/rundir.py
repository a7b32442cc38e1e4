"""The folder of a run."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)


class RunDir:
    """Paths of the files that a run writes.

    Args:
        root: folder of the run.

    Attributes:
        config: the resolved configuration.
        metrics: one JSON object per log step.
        bad_frames: a line per frame that cannot be decoded.
        wandb_id: id of the run in Weights & Biases.
        profile: folder of the traces of `profile.steps`.
        newest_picture: the newest reconstruction.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.metrics = root / "metrics.jsonl"
        self.bad_frames = root / "bad_frames.log"
        self.checkpoints = root / "checkpoints"
        self.tensorboard = root / "tensorboard"
        self.wandb_id = root / "wandb_id"
        self.profile = root / "profile"
        self.newest_picture = root / "reconstruction.png"

    def picture(self, step: int, name: str = "reconstruction") -> Path:
        """A picture after `step` steps; the name of reconstructions is left out."""
        prefix = "step" if name == "reconstruction" else name
        return self.root / "pictures" / f"{prefix}_{step:07d}.png"

    def set_aside(self) -> None:
        """Rename the folder, if it holds a run, to the next free `<name>.old-<n>`."""
        if not self.config.exists():
            return
        number = 1
        while (old := self.root.with_name(f"{self.root.name}.old-{number}")).exists():
            number += 1
        self.root.rename(old)
        log.info("the run in %s was renamed to %s", self.root, old)

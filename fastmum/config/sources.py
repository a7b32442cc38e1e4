"""Configuration of where a task's frames come from, shared by all tasks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fastmum.config.schema import ConfigError, key


@dataclass
class ScenesSection:
    """The embedded scenes, rendered if neither data.root nor data.manifests is set."""

    count: int = key(20, "scenes to render, held-out ones included", least=1)
    views: int = key(24, "views of each scene", least=1)
    size: int = key(256, "side of a rendered view in pixels", least=1)
    seed: int = key(0, "random seed of the scenes", least=0)


@dataclass
class SourceSection:
    """Where the frames of any task come from, and what is held out."""

    manifests: list[str] = key([], "files of sequences, built by python -m fastmum.data.build", is_path=True)
    weights: dict[str, float] = key({}, "weights of data sets, {co3d: 2}; 1 for those not named, 0 for never", least=0)
    roots: dict[str, str] = key(
        {}, "folders or URLs (s3://...) that data sets were moved to, {co3d: /nvme/co3d}; also $FASTMUM_ROOT_CO3D",
        is_path=True,
    )  # fmt: skip
    stage: str | None = key(
        None, "folder on a local disk for copies of the coming steps' files, shared by a machine's processes",
        is_path=True,
    )  # fmt: skip
    stage_gb: float = key(100.0, "size of the copies in data.stage, of which the oldest are deleted", above=0)
    root: str | None = key(
        None, "folder whose image folders are sequences (tasks with cameras: RGB-D scenes, fastmum data build rgbd). "
        "Without it and manifests: embedded scenes", is_path=True,
    )  # fmt: skip
    held_out: float = key(0.1, "share of scenes held out from training for evaluation", least=0, below=1)
    retry_s: float = key(10.0, "seconds to retry files that are missing or unreadable before they are bad", least=0)
    scenes: ScenesSection = field(default_factory=ScenesSection)

    def refuse(self, rules: Iterable[tuple[str, Any, bool, str]]) -> None:
        """ConfigError for the first of some rules (key, value, whether it fits, what is allowed) that does not fit.

        Embedded scenes, which are rendered if there is no other data, must be two.
        """
        count = "scenes.count", self.scenes.count, not self.embedded or self.scenes.count >= 2
        for name, value, fits, allowed in (*rules, (*count, "at least 2, one of them held out")):
            if not fits:
                raise ConfigError(f"data.{name} is {value}, but must be {allowed}")

    @property
    def embedded(self) -> bool:
        """Whether the embedded scenes are rendered."""
        return self.root is None and not self.manifests

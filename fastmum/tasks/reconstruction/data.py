"""Data of feedforward reconstruction: its configuration, and the training and held-out frames of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmum.config.schema import key
from fastmum.config.sources import SourceSection
from fastmum.data.manifest import Manifests
from fastmum.data.scene_loader import SceneLoader
from fastmum.data.scene_plan import GROUND_TRUTH, ScenePlanner
from fastmum.tasks.splits import open_planners


@dataclass
class SceneDataSection(SourceSection):
    """Frames with depth and cameras, and their sampling (VGGT's training, as the paper's authors run it)."""

    views: list[int] = key([2, 24], "fewest and most frames of a sequence; a batch has one number", above=0, length=2)
    window: int = key(
        0, "frames of a sequence are within this many times its length of the first one; 0: anywhere, but in VKITTI 2",
        least=0,
    )  # fmt: skip
    min_frames: int = key(24, "fewest frames with depth and camera that a sequence must have", least=1)
    frames_per_batch: int = key(48, "frames that a device computes at once, at most", least=1)
    frames_per_step: int | None = key(
        None, "frames of an optimizer step over all devices, a multiple of frames_per_batch; micro-batches beyond one "
        "per device are accumulated. Empty: one batch per device, or the value of the resumed run"
    )  # fmt: skip
    image_size: int = key(512, "width of a frame in pixels", least=16)
    aspects: list[float] = key([0.33, 1.0], "height over width of a batch, uniform", above=0, most=1, length=2)
    augment: bool = key(True, "random crops and colours")
    workers: int = key(2, "threads that read frames", least=1)

    def check(self, patch_size: int) -> None:
        """Check rules between keys; the task's configuration calls it."""
        step, batch, size, scenes = self.frames_per_step, self.frames_per_batch, self.image_size, self.scenes
        self.refuse((
            ("views", self.views, self.views[0] <= self.views[1], "[fewest, most]"),
            ("aspects", self.aspects, self.aspects[0] <= self.aspects[1], "[least, most]"),
            ("frames_per_batch", batch, batch >= self.views[1], f"at least the most data.views ({self.views[1]})"),
            ("image_size", size, size % patch_size == 0, f"a multiple of the patch size {patch_size}"),
            ("frames_per_step", step, step is None or (step > 0 and step % batch == 0),
             f"a positive multiple of data.frames_per_batch ({batch})"),
            ("scenes.views", scenes.views, not self.embedded or scenes.views >= self.min_frames,
             f"at least data.min_frames ({self.min_frames})"),
        ))  # fmt: skip


class SceneSplits(NamedTuple):
    """Planners of the two splits."""

    manifests: Manifests  # the planners' rows index these
    training: ScenePlanner  # draws from all sequences that are not held out
    held_out: ScenePlanner | None  # draws from the held-out sequences, without augmentation; None if there are none
    is_held_out: np.ndarray  # (sequences,) bool

    def loader(self, data: SceneDataSection, bad_frames: Path | None = None, processes: int = 1) -> SceneLoader:
        """The loader of both splits' plans; `bad_frames` and `processes` are those of `Faults`."""
        return SceneLoader(
            self.manifests, data.workers, ground_truth=self.training.ground_truth, bad_frames=bad_frames,
            held_out=self.is_held_out, processes=processes, retry_s=data.retry_s, usable=self.training.usable,
        )  # fmt: skip


def open_scenes(
    data: SceneDataSection, folder: Path, seed: int = 0, patch_size: int = 16, resumed: bool = False,
    micro_batches: int = 1, ground_truth: bool = True,
) -> SceneSplits:  # fmt: skip
    """The splits of a run; arguments and errors as of `open_planners`.

    With `ground_truth=False` depth and cameras are not needed, and `data.root` may be any folder of folders of images.
    """

    def planner(manifests: Manifests, **options: Any) -> ScenePlanner:
        views, aspects = (data.views[0], data.views[1]), (data.aspects[0], data.aspects[1])
        return ScenePlanner(
            manifests, data.weights, data.frames_per_batch, views, data.min_frames, data.image_size, aspects,
            patch_size, ground_truth=ground_truth, window=data.window, **options,
        )  # fmt: skip

    columns, builder = (GROUND_TRUTH, "rgbd") if ground_truth else ((), "folder")
    return SceneSplits(*open_planners(
        data, folder, seed, resumed, micro_batches, data.min_frames, columns, planner, data.augment, builder
    ))  # fmt: skip

"""Data of feedforward reconstruction: its configuration, and the training and held-out frames of a run."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmum.config.mum import ScenesSection
from fastmum.config.schema import ConfigError, key
from fastmum.data import staging
from fastmum.data.manifest import Manifests
from fastmum.data.scene_loader import SceneLoader
from fastmum.data.scene_plan import ScenePlanner, usable_frames
from fastmum.data.splits import HELD_OUT_SEED, check_overlap, hold_out, open_manifests

log = logging.getLogger(__name__)


@dataclass
class SceneDataSection:
    """Frames with depth and cameras, and their sampling (VGGT's training, as the paper's authors run it)."""

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
        None, "folder of RGB-D scenes (fastmum data build rgbd); without it and manifests: embedded scenes",
        is_path=True,
    )  # fmt: skip
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
    held_out: float = key(0.1, "share of scenes held out from training for evaluation", least=0, below=1)
    workers: int = key(2, "threads that read frames", least=1)
    retry_s: float = key(10.0, "seconds to retry files that are missing or unreadable before they are bad", least=0)
    scenes: ScenesSection = field(default_factory=ScenesSection)

    def check(self, patch_size: int) -> None:
        """Check rules between keys; the task's configuration calls it."""
        step, batch, size, scenes = self.frames_per_step, self.frames_per_batch, self.image_size, self.scenes
        embedded = self.root is None and not self.manifests
        for name, value, fits, allowed in (
            ("views", self.views, self.views[0] <= self.views[1], "[fewest, most]"),
            ("aspects", self.aspects, self.aspects[0] <= self.aspects[1], "[least, most]"),
            ("frames_per_batch", batch, batch >= self.views[1], f"at least the most data.views ({self.views[1]})"),
            ("image_size", size, size % patch_size == 0, f"a multiple of the patch size {patch_size}"),
            ("frames_per_step", step, step is None or (step > 0 and step % batch == 0),
             f"a positive multiple of data.frames_per_batch ({batch})"),
            ("scenes.count", scenes.count, not embedded or scenes.count >= 2, "at least 2, one of them held out"),
            ("scenes.views", scenes.views, not embedded or scenes.views >= self.min_frames,
             f"at least data.min_frames ({self.min_frames})"),
        ):  # fmt: skip
            if not fits:
                raise ConfigError(f"data.{name} is {value}, but must be {allowed}")


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
    """Open the manifests of a run and hold out some of their scenes, as in pretraining.

    Manifests of `data.root` and of the embedded scenes are written to the run's `folder`; `resumed` reuses those that
    the run wrote at its start. `micro_batches` is the number of batches in a training step, on all processes together.
    With `ground_truth=False` depth and cameras are not needed, and `data.root` may be any folder of folders of images.

    DataError: missing or empty manifests or folders, scenes that cannot be rendered, no sequence that can be drawn, or
    images that are held out and trained on.
    """
    roots, builder = {"data.root": data.root}, "rgbd" if ground_truth else "folder"
    manifests = open_manifests(
        data.manifests, roots, data.scenes, folder / "manifests", resumed, data.min_frames, builder, data.roots
    )
    staging.start(data.stage, data.stage_gb)
    usable = usable_frames(manifests, data.min_frames, ground_truth)
    held, is_held_out = hold_out(manifests, data.held_out, data.min_frames, data.weights, usable)

    def planner(seed: int, **options: Any) -> ScenePlanner:
        views, aspects = (data.views[0], data.views[1]), (data.aspects[0], data.aspects[1])
        return ScenePlanner(
            manifests, data.weights, data.frames_per_batch, views, data.min_frames, data.image_size, aspects,
            patch_size, seed, ground_truth=ground_truth, window=data.window, **options,
        )  # fmt: skip

    training = planner(seed, world_size=micro_batches, augment=data.augment, exclude=np.flatnonzero(is_held_out))
    for note in training.notes:
        log.info("%s", note)
    lengths = np.add.reduceat(usable, manifests.starts[:-1], dtype=np.int64)
    drawn = ~is_held_out & (lengths > 0)
    log.info(
        "training on %d sequences (%d frames), held out: %d (%d frames)",
        drawn.sum(), lengths[drawn].sum(), len(held), lengths[held].sum(),
    )  # fmt: skip
    if not len(held):
        why = "all sequences that can be drawn are of one scene" if data.held_out else "data.held_out is 0"
        log.warning("no sequence is held out, so there is no evaluation: %s", why)
        return SceneSplits(manifests, training, None, is_held_out)
    check_overlap(manifests, is_held_out, data.weights)
    return SceneSplits(manifests, training, planner(HELD_OUT_SEED, augment=False, only=held), is_held_out)

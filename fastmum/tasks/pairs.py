"""Data of the tasks that train on two views: their configuration, and the training and held-out pairs of a run."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmum.config.mum import ScenesSection
from fastmum.config.schema import ConfigError, key
from fastmum.data.manifest import Manifests
from fastmum.data.pair_loader import Geometry, PairLoader, crop_view
from fastmum.data.pair_plan import SAMPLING, PairPlanner
from fastmum.data.scene_plan import GROUND_TRUTH, usable_frames
from fastmum.data.splits import HELD_OUT_SEED, check_overlap, hold_out, open_manifests

log = logging.getLogger(__name__)

MIN_FRAMES = 2


@dataclass
class PairDataSection:
    """Pairs of frames with cameras, and their sampling."""

    manifests: list[str] = key([], "files of sequences, built by python -m fastmum.data.build", is_path=True)
    weights: dict[str, float] = key({}, "weights of data sets, {scannet: 2}; 1 for those not named, 0: never", least=0)
    root: str | None = key(
        None, "folder of RGB-D scenes (fastmum data build rgbd); without it and manifests: embedded scenes",
        is_path=True,
    )  # fmt: skip
    sampling: str = key(
        "auto", "overlap: pairs by overlap, from depth; distance: by frames between them; auto: by overlap where depth "
        "is known and gaps gives no distance", choices=SAMPLING,
    )  # fmt: skip
    overlap: list[float] = key(
        [0.1, 0.7], "least and most share of a frame that the other sees", least=0, most=1, length=2
    )
    gaps: dict[str, list[int]] = key({}, "least and most distance in frames, {scannet: [10, 500]}, by data set")
    pairs_per_batch: int = key(32, "pairs that a device computes at once", least=1)
    pairs_per_step: int | None = key(
        None, "pairs of an optimizer step over all devices, a multiple of pairs_per_batch; micro-batches beyond one "
        "per device are accumulated. Empty: one batch per device, or the value of the resumed run"
    )  # fmt: skip
    image_size: int = key(256, "side of a frame in pixels", least=16)
    augment: bool = key(True, "random colours")
    held_out: float = key(0.1, "share of scenes held out from training for evaluation", least=0, below=1)
    workers: int = key(2, "threads that read frames", least=1)
    retry_s: float = key(10.0, "seconds to retry files that are missing or unreadable before they are bad", least=0)
    scenes: ScenesSection = field(default_factory=ScenesSection)

    def check(self, patch_size: int) -> None:
        """Check rules between keys; the task's configuration calls it."""
        step, batch, size, scenes = self.pairs_per_step, self.pairs_per_batch, self.image_size, self.scenes
        embedded = self.root is None and not self.manifests
        for name, value, fits, allowed in (
            ("overlap", self.overlap, self.overlap[0] <= self.overlap[1], "[least, most]"),
            ("gaps", self.gaps, all(len(g) == 2 and 1 <= g[0] <= g[1] for g in self.gaps.values()),
             "[least, most] of each data set, at least 1"),
            ("image_size", size, size % patch_size == 0, f"a multiple of the patch size {patch_size}"),
            ("pairs_per_step", step, step is None or (step > 0 and step % batch == 0),
             f"a positive multiple of data.pairs_per_batch ({batch})"),
            ("scenes.count", scenes.count, not embedded or scenes.count >= 2, "at least 2, one of them held out"),
        ):  # fmt: skip
            if not fits:
                raise ConfigError(f"data.{name} is {value}, but must be {allowed}")


class PairSplits(NamedTuple):
    """Planners of the two splits."""

    manifests: Manifests  # the planners' rows index these
    training: PairPlanner  # draws from all sequences that are not held out
    held_out: PairPlanner | None  # draws from the held-out sequences, without augmentation; None if there are none
    is_held_out: np.ndarray  # (sequences,) bool

    def loader(
        self, data: PairDataSection, bad_frames: Path | None = None, processes: int = 1,
        geometry: Geometry = crop_view, kind: type[PairLoader] = PairLoader,
    ) -> PairLoader:  # fmt: skip
        """The loader of both splits' plans; `bad_frames` and `processes` are those of `Faults`."""
        return kind(
            (self.training, self.held_out), data.workers, geometry, bad_frames=bad_frames, held_out=self.is_held_out,
            processes=processes, retry_s=data.retry_s,
        )  # fmt: skip


def open_pairs(
    data: PairDataSection, folder: Path, seed: int = 0, resumed: bool = False, micro_batches: int = 1,
    depth: bool = False, planner: Callable[..., PairPlanner] = PairPlanner,
) -> PairSplits:  # fmt: skip
    """Open the manifests of a run and hold out some of their scenes, as in pretraining.

    Manifests of `data.root` and of the embedded scenes are written to the run's `folder`; `resumed` reuses those that
    the run wrote at its start. `micro_batches` is the number of batches in a training step, on all processes together.
    `depth`: whether frames must have depth. `planner` makes the planners; its arguments are those of `PairPlanner`.

    DataError: missing or empty manifests or folders, scenes that cannot be rendered, no pair that can be drawn, or
    images that are held out and trained on.
    """
    roots = {"data.root": data.root}
    manifests = open_manifests(
        data.manifests, roots, data.scenes, folder / "manifests", resumed, MIN_FRAMES, "rgbd"
    )  # fmt: skip
    usable = usable_frames(manifests, MIN_FRAMES, True, GROUND_TRUTH if depth else GROUND_TRUTH[:2])
    held, is_held_out = hold_out(manifests, data.held_out, MIN_FRAMES, data.weights, usable)
    settings: dict[str, Any] = {
        "sampling": data.sampling, "overlap": tuple(data.overlap), "depth": depth, "workers": data.workers,
        "gaps": {name: (least, most) for name, (least, most) in data.gaps.items()},
    }  # fmt: skip
    fixed = manifests, data.weights, data.pairs_per_batch, (data.image_size, data.image_size)
    training = planner(
        *fixed, seed, micro_batches, augment=data.augment, exclude=np.flatnonzero(is_held_out), **settings
    )
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
        return PairSplits(manifests, training, None, is_held_out)
    check_overlap(manifests, is_held_out, data.weights)
    evaluated = planner(*fixed, HELD_OUT_SEED, augment=False, only=held, **settings)
    return PairSplits(manifests, training, evaluated, is_held_out)

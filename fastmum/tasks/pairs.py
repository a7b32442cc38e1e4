"""Data of the tasks that train on two views: their configuration, and the training and held-out pairs of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmum.config.schema import key
from fastmum.config.sources import SourceSection
from fastmum.data.manifest import Manifests
from fastmum.data.pair_lists import rows_of_list
from fastmum.data.pair_loader import Geometry, PairLoader, crop_view
from fastmum.data.pair_plan import SAMPLING, PairPlanner
from fastmum.data.scene_plan import GROUND_TRUTH
from fastmum.tasks.splits import open_planners

MIN_FRAMES = 2


@dataclass
class PairDataSection(SourceSection):
    """Pairs of frames with cameras, and their sampling."""

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
    augment: bool = key(True, "jitter, shift and flip in training")
    jitter: bool = key(True, "random colours")
    shift: int = key(0, "largest shift of both images of a pair, pixels along either axis", least=0)
    flip: bool = key(False, "mirror both images of every second pair")
    workers: int = key(2, "threads that read frames", least=1)

    def check(self, patch_size: int) -> None:
        """Check rules between keys; the task's configuration calls it."""
        step, batch, size = self.pairs_per_step, self.pairs_per_batch, self.image_size
        self.refuse((
            ("overlap", self.overlap, self.overlap[0] <= self.overlap[1], "[least, most]"),
            ("gaps", self.gaps, all(len(g) == 2 and 1 <= g[0] <= g[1] for g in self.gaps.values()),
             "[least, most] of each data set, at least 1"),
            ("image_size", size, size % patch_size == 0, f"a multiple of the patch size {patch_size}"),
            ("shift", self.shift, self.shift < size, f"below data.image_size ({size})"),
            ("pairs_per_step", step, step is None or (step > 0 and step % batch == 0),
             f"a positive multiple of data.pairs_per_batch ({batch})"),
        ))  # fmt: skip


class PairSplits(NamedTuple):
    """Planners of the two splits."""

    manifests: Manifests  # the planners' rows index these
    training: PairPlanner  # draws from all sequences that are not held out
    held_out: PairPlanner | None  # draws from the held-out sequences, without augmentation; None if there are none
    is_held_out: np.ndarray  # (sequences,) bool

    def loader(
        self, data: PairDataSection, bad_frames: Path | None = None, processes: int = 1,
        geometry: Geometry = crop_view,
    ) -> PairLoader:  # fmt: skip
        """The loader of both splits' plans; `bad_frames` and `processes` are those of `Faults`."""
        return PairLoader(
            (self.training, self.held_out), data.workers, geometry, bad_frames=bad_frames, held_out=self.is_held_out,
            processes=processes, retry_s=data.retry_s,
        )  # fmt: skip


def open_pairs(
    data: PairDataSection, folder: Path, seed: int = 0, resumed: bool = False, micro_batches: int = 1,
    depth: bool = False, planner: Callable[..., PairPlanner] = PairPlanner,
) -> PairSplits:  # fmt: skip
    """The splits of a run; arguments and errors as of `open_planners`.

    `depth`: whether frames must have depth. `planner` makes the planners; its arguments are those of `PairPlanner`.
    """
    settings: dict[str, Any] = {
        "weights": data.weights, "pairs_per_batch": data.pairs_per_batch, "size": (data.image_size, data.image_size),
        "sampling": data.sampling, "overlap": tuple(data.overlap), "depth": depth, "workers": data.workers,
        "jitter": data.jitter, "shift": data.shift, "flip": data.flip,
        "gaps": {name: (least, most) for name, (least, most) in data.gaps.items()},
    }  # fmt: skip
    columns = GROUND_TRUTH if depth else GROUND_TRUTH[:2]
    splits = PairSplits(*open_planners(
        data, folder, seed, resumed, micro_batches, MIN_FRAMES, columns, partial(planner, **settings), data.augment
    ))  # fmt: skip
    rows_of_list.cache_clear()  # which both planners have read
    return splits

"""Batches of frames with depth and cameras: reading, cleaning and cropping of frames, and their replacement if bad."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmum.data import store
from fastmum.data.colour import jitter
from fastmum.data.decode.image import FrameError
from fastmum.data.depth import require_package
from fastmum.data.loader import PlanLoader
from fastmum.data.manifest import Manifests
from fastmum.data.samples import manifest_frame
from fastmum.data.scene_plan import Rule, ScenePlan, rule_of
from fastmum.data.store import is_url
from fastmum.errors import FastmumError
from fastmum.geometry import Camera, View
from fastmum.geometry.camera import intrinsics_matrix
from fastmum.geometry.crop import clean_depth, vggt_view

LEAST_DEPTH = 1e-8  # VGGT's training: smaller ones are unknown


class SceneBatch(NamedTuple):
    """Packed sequences of frames of one size, sequence by sequence. Conventions are those of `docs/geometry.md`."""

    images: Tensor  # (F, H, W, 3) uint8
    depth: Tensor  # (F, H, W) float32, z-depth in metres or the unit of the sequence, 0 where it is unknown
    valid: Tensor  # (F, H, W) bool, where the depth is known
    intrinsics: Tensor  # (F, 3, 3) float32, pixels, centres at +0.5; NaN where unknown
    camera_from_world: Tensor  # (F, 4, 4) float32, OpenCV axes, in the unit of the depth; NaN where unknown
    lengths: tuple[int, ...]  # frames of each sequence
    names: tuple[str, ...]  # data set and name of each sequence


class SceneLoader(PlanLoader[Any, SceneBatch]):
    """Loads plans of `ScenePlanner`; bad images, depth maps and masks are replaced and counted as in pretraining.

    If no frame of a sequence can be read, another sequence takes its place as a whole, since frames of two sequences
    have no common world. DataError: a package that reads the depth maps is not installed. `ground_truth` and `usable`
    are those of the planner, `options` those of `PlanLoader`.
    """

    def __init__(self, manifests: Manifests, workers: int, *, ground_truth: bool = True, **options: Any) -> None:
        super().__init__(manifests, workers, **options)
        self._ground_truth = ground_truth
        self._ahead = store.stage is not None or any(is_url(part.root) for part in manifests.parts)
        self._rules = [rule_of(manifests, name) for name in manifests.datasets]
        for reader in sorted(manifests.depth_readers) if ground_truth else ():
            require_package(reader, "the depth of a data set")

    def files_of(self, row: int) -> list[Path]:
        """The image, its depth map and its mask."""
        frame = manifest_frame(self.manifests, row)
        maps = (frame.depth, frame.mask) if self._ground_truth else ()
        return [file for file in (frame.file, *maps) if file is not None]

    def files_of_plan(self, plan: ScenePlan) -> list[Path]:
        """Images, depth maps with what these need, and masks, if any are copied or read ahead of time."""
        files = [file for row in plan.rows.tolist() for file in self.files_of(row)] if self._ahead else []
        return files + [side for file in files if (side := getattr(file, "side", None)) is not None]

    def decode(self, plan: ScenePlan, at: np.ndarray, rows: np.ndarray) -> tuple[list[View | None], dict[int, str]]:
        """Views with depth and camera, of the size of the plan."""
        views: list[View | None] = []
        bad: dict[int, str] = {}
        for i, (place, row) in enumerate(zip(at.tolist(), rows.tolist(), strict=True)):
            view = None
            try:
                view = self._read(plan, place, row)
            except (FastmumError, FrameError) as error:
                bad[i] = str(error)
            views.append(view)
        return views, bad

    def _read(self, plan: ScenePlan, place: int, row: int) -> View:
        frame = manifest_frame(self.manifests, row)
        rule = self._rules[self.manifests.dataset_of[self.manifests.sequence_of(row)]]
        if not self._ground_truth:
            frame = replace(frame, depth=None, mask=None)
        view = frame.view(
            lambda whole: vggt_view(
                clean(whole, rule), plan.size, scale=tuple(plan.scales[place]), margin=plan.margins[place]
            )
        )
        return replace(view, image=jitter(view.image, plan.jitter[place]))

    def replace(self, plan: ScenePlan, frames: list[View | None], bad: Iterable[int]) -> ScenePlan:
        """Put other frames of its sequence in place of a bad one, or of another sequence in place of all its frames."""
        rows, sequence_of, broken = plan.rows.copy(), self.manifests.sequence_of, set(bad)
        ends = np.cumsum(plan.lengths).tolist()
        for first, end in zip([0, *ends], ends, strict=False):
            for i in sorted(broken.intersection(range(first, end))):
                own = sequence_of(rows[i])
                frames[i], rows[i] = self.replacement(plan, i, int(rows[i]), set(rows.tolist()))
                if sequence_of(rows[i]) != own:
                    for k in (k for k in range(first, end) if k != i):
                        frames[k], rows[k] = self._near(plan, k, int(rows[i]), set(rows.tolist()))
                    break
        return plan._replace(rows=rows)

    def _near(self, plan: ScenePlan, index: int, row: int, taken: set[int]) -> tuple[View, int]:
        """A frame of the sequence of a good `row`, which may be that row itself."""
        own = self.manifests.sequence_of(row)
        others = takewhile(lambda r: self.manifests.sequence_of(r) == own, self.faults.replacements(row, taken))
        for candidate in chain(others, [row]):
            if (view := self.try_row(plan, index, candidate)) is not None:
                return view, candidate
        raise FastmumError(f"'{self.manifests.file(row)}' could be read before, but not again; restore it")

    def finish(self, plan: ScenePlan, frames: list[View]) -> SceneBatch:
        """Stack the views."""
        manifests, firsts = self.manifests, np.cumsum([0, *plan.lengths[:-1]])
        names = [sequence_label(manifests, int(i)) for i in manifests.sequence_of(plan.rows[firsts])]
        return stack(frames, plan.lengths.tolist(), names)


def sequence_label(manifests: Manifests, sequence: int) -> str:
    """Data set and name of a sequence."""
    return f"{manifests.datasets[manifests.dataset_of[sequence]]}/{manifests.sequence_name(sequence)}"


def clean(view: View, rule: Rule) -> View:
    """Remove unreliable depth. A view without camera gets one in its centre, of unknown focal length and pose."""
    depth, camera = view.depth, view.camera
    if depth is not None:
        if rule.masked and view.mask is not None:
            depth = np.where(view.mask, depth, np.float32(0))
        depth = clean_depth(depth, rule.percentile, rule.max_depth)
    if camera is None:
        K = intrinsics_matrix(np.nan, np.nan, view.size[0] / 2, view.size[1] / 2)
        camera = Camera(K, np.full((4, 4), np.nan), view.size)
    return replace(view, depth=depth, camera=camera, mask=None)


def stack(views: Sequence[View], lengths: Sequence[int], names: Sequence[str]) -> SceneBatch:
    """A batch of views of one size, which have cameras; depth of views that have none is unknown."""
    cameras = [view.camera for view in views if view.camera is not None]
    unknown = np.zeros(views[0].image.shape[:2], np.float32)
    depth = torch.from_numpy(np.stack([unknown if view.depth is None else view.depth for view in views]))
    return SceneBatch(
        torch.from_numpy(np.stack([view.image for view in views])),
        depth,
        depth > LEAST_DEPTH,
        torch.from_numpy(np.stack([camera.K for camera in cameras]).astype(np.float32)),
        torch.from_numpy(np.stack([camera.camera_from_world for camera in cameras]).astype(np.float32)),
        tuple(lengths),
        tuple(names),
    )

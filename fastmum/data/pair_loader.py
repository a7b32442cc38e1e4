"""Batches of pairs of frames with cameras, and depth if it is asked for."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastmum.data.colour import jitter
from fastmum.data.errors import DataError
from fastmum.data.pair_plan import PairPlan, PairPlanner
from fastmum.data.samples import manifest_frame
from fastmum.data.scene_loader import SceneLoader
from fastmum.geometry import View, crop_resize
from fastmum.geometry.crop import flip, reloc3r_view

FILL = np.array([124, 116, 104], np.uint8)  # of what a shift uncovers: ImageNet's mean, 255 (0.485, 0.456, 0.406)
MAX_TRIES = 100  # pairs that are tried in place of one that cannot be read

Geometry = Callable[[View, tuple[int, int]], View]


def crop_view(view: View, size: tuple[int, int]) -> View:
    """The largest square around the principal point, resized to the square `size` (Reloc3r's training)."""
    return reloc3r_view(view, size, np.random.default_rng(0))  # which is only asked for other sizes


def square_view(view: View, size: tuple[int, int]) -> View:
    """The whole image squeezed into `size`, as RoMa trains: image bicubic, depth bilinear."""
    depth = view.depth
    if depth is not None:
        depth = F.interpolate(torch.from_numpy(depth)[None, None], size[::-1], mode="bilinear")[0, 0].numpy()
    resized = crop_resize(replace(view, depth=None), None, size, resample=Image.Resampling.BICUBIC)
    return replace(resized, depth=depth)


def shifted(view: View, right: int, down: int) -> View:
    """Move the content by pixels; what comes in from outside is of the mean colour, and of unknown depth."""
    width, height = view.size
    view = replace(view, mask=np.ones((height, width), bool))
    moved = crop_resize(view, (-right, -down, width - right, height - down))
    assert moved.mask is not None
    return replace(moved, image=np.where(moved.mask[..., None], moved.image, FILL), mask=None)


def mirrored(view: View) -> View:
    """Mirror left to right, and the world with it, so that fx stays positive and the pose a rotation."""
    view, mirror = flip(view), np.diag([-1.0, 1, 1, 1])
    camera = view.camera
    if camera is not None:
        pose = mirror @ camera.camera_from_world @ mirror
        camera = replace(camera, K=camera.K @ mirror[:3, :3], camera_from_world=pose)
    return replace(view, camera=camera)


class PairLoader(SceneLoader):
    """Loads plans of `PairPlanner` as a `SceneBatch` whose sequences are the pairs: frames 2 i and 2 i + 1.

    Where a frame is bad, another pair of its data set and split takes the place of its pair; bad frames are counted as
    in pretraining. DataError: a package that reads the depth maps is not installed.

    Args:
        planners: of training and of the held-out scenes (None: there are none), of the same manifests.
        geometry: brings the image, depth and camera of a frame to the size (width, height) of the plan.
        options: those of `PlanLoader`.
    """

    def __init__(
        self, planners: tuple[PairPlanner, PairPlanner | None], workers: int, geometry: Geometry = crop_view,
        **options: Any,
    ) -> None:  # fmt: skip
        first = planners[0]
        super().__init__(first.manifests, workers, ground_truth=first.depth, usable=first.usable, **options)
        self.geometry, self._planners = geometry, planners

    def _read(self, plan: PairPlan, place: int, row: int) -> View:  # type: ignore[override]
        frame = manifest_frame(self.manifests, row)
        if not self._ground_truth:
            frame = replace(frame, depth=None, mask=None)
        view = frame.view(lambda whole: self.geometry(whole, plan.size))
        view = replace(view, image=jitter(view.image, plan.jitter[place]), mask=None)
        if (shift := plan.shift[place // 2]).any():
            view = shifted(view, *shift.tolist())
        return mirrored(view) if plan.flip[place // 2] else view

    def replace(self, plan: PairPlan, frames: list[View | None], bad: Iterable[int]) -> PairPlan:  # type: ignore[override]
        """Draw other pairs in place of those with a bad frame."""
        rows = plan.rows.copy()
        for pair in sorted({i // 2 for i in bad}):
            both = slice(2 * pair, 2 * pair + 2)
            row, place = int(rows[2 * pair]), range(both.start, both.stop)
            planner = self._planners[int(self.faults.held_out[self.manifests.sequence_of(row)])]
            assert planner is not None
            rng = np.random.default_rng((planner.seed, *rows[both]))
            for _ in range(MAX_TRIES):
                found = planner.another(row, rng)
                views = [self.try_row(plan, i, other) for i, other in zip(place, found.tolist(), strict=True)]
                if all(view is not None for view in views):
                    frames[both], rows[both] = views, found
                    break
            else:
                files = " and ".join(f"'{file}'" for file in self.manifests.files(rows[both]))
                raise DataError(f"{files}, and {MAX_TRIES} other pairs of their data set, cannot be read; restore them")
        return plan._replace(rows=rows)

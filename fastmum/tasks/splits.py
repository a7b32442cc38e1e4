"""Training and held-out frames of the tasks that need cameras."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from fastmum.config.sources import SourceSection
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests
from fastmum.data.scene_plan import usable_frames
from fastmum.data.splits import HELD_OUT_SEED, check_overlap, hold_out, open_manifests, report_split


class Planner(Protocol):
    """What this module needs of a planner."""

    notes: list[str]


P = TypeVar("P", bound=Planner)


def open_planners(
    data: SourceSection, folder: Path, seed: int, resumed: bool, micro_batches: int, least: int,
    columns: Iterable[str], planner: Callable[..., P], augment: bool, builder: str = "rgbd",
) -> tuple[Manifests, P, P | None, np.ndarray]:  # fmt: skip
    """Open the manifests of a run and hold out some of their scenes, as in pretraining.

    Returns the manifests, the planner of training, that of the held-out sequences, without augmentation (None if there
    are none), and which sequences are held out, (sequences,) bool. Manifests of `data.root` and of the embedded scenes
    are written to the run's `folder`; `resumed` reuses those that the run wrote at its start.

    DataError: missing or empty manifests or folders, scenes that cannot be rendered, nothing that can be drawn, or
    images that are held out and trained on.

    Args:
        micro_batches: batches in a training step, on all processes together.
        least: fewest usable frames of a sequence; those that have all `columns` are usable.
        planner: makes a planner from manifests, and seed, world_size, augment, exclude and only by name.
        builder: of a manifest of `data.root`.
    """
    manifests = open_manifests(data, folder, resumed, least, builder)
    usable = usable_frames(manifests, least, columns)
    held, is_held_out = hold_out(manifests, data.held_out, least, data.weights, usable)
    shared: dict[str, Any] = {"seed": seed, "world_size": micro_batches, "augment": augment}
    training, evaluated = planner(manifests, exclude=np.flatnonzero(is_held_out), **shared), None
    lengths = np.add.reduceat(usable, manifests.starts[:-1], dtype=np.int64)
    if report_split(training.notes, lengths, held, is_held_out, data.held_out):
        check_overlap(manifests, is_held_out, data.weights)
        try:
            evaluated = planner(manifests, only=held, seed=HELD_OUT_SEED, augment=False)
        except DataError as error:
            raise DataError(f"of the {len(held)} held-out sequences (data.held_out): {error}") from None
    return manifests, training, evaluated, is_held_out

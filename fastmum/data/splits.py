"""What a run trains and is evaluated on, from its configuration."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmum.config import Config
from fastmum.data.build import NoSequenceError, build
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifest, Manifests, write_manifest
from fastmum.data.plan import StepPlanner
from fastmum.data.split import held_out

log = logging.getLogger(__name__)

HELD_OUT_SEED = 0  # not the run's: runs of different seeds are evaluated on the same batches


class DataSplits(NamedTuple):
    """Planners of the two splits, and sequences to draw pictures from.

    Args:
        manifests: the planners' rows are of.
        training: draws from everything that is not held out.
        held_out: draws from what is, None where nothing is.
        shown: numbers of the held-out sequences, or of those of training where nothing is held out.
        is_held_out: (sequences,) bool.
    """

    manifests: Manifests
    training: StepPlanner
    held_out: StepPlanner | None
    shown: np.ndarray
    is_held_out: np.ndarray


def open_splits(config: Config, folder: Path, resumed: bool = False, parts: int = 1) -> DataSplits:
    """Open the manifests of a run and hold some of their sequences out.

    Folders of images (`data.root`, `data.image_root`) and the embedded scenes, which are rendered where nothing else is
    given, get a manifest of their own. Held-out sequences are sampled like those of training, so that the two losses
    can be compared; single images are not held out.

    Args:
        config: of the run.
        folder: the run's, for manifests of its own.
        resumed: take the manifests that the run wrote when it began, so that it goes on with the same sequences.
        parts: batches of `data.frames_per_batch` frames that a step of training has, on all processes together.

    Raises:
        DataError: a manifest or folder that is missing or holds no sequences, scenes that cannot be rendered, or
            settings that cannot be met.
    """
    data, views = config.data, (config.data.views[0], config.data.views[1])
    manifests = Manifests(_manifests(config, folder / "manifests", resumed))
    lengths = np.diff(manifests.starts)
    candidates = np.flatnonzero((lengths >= max(2, views[0])) & _drawn(manifests, data.weights))
    held = candidates[held_out([manifests.sequence_name(i) for i in candidates.tolist()], data.held_out)]
    planner = functools.partial(
        StepPlanner,
        manifests,
        weights=data.weights,
        frames_per_gpu=data.frames_per_batch,
        views=views,
        mode=data.mode,
        crop_scale=(data.crop_scale[0], data.crop_scale[1]),
        crop_aspect=(data.crop_aspect[0], data.crop_aspect[1]),
        flip=data.flip,
    )
    training = planner(imagenet_share=data.imagenet_share, seed=config.run.seed, world_size=parts, exclude=held)
    for note in training.notes:
        log.info("%s", note)
    if not len(held):
        log.warning("no sequence is held out, so there is no evaluation: data.held_out is %g", data.held_out)
    log.info(
        "training on %d sequences (%d frames), held out: %d (%d frames)",
        len(lengths) - len(held), manifests.num_frames - lengths[held].sum(), len(held), lengths[held].sum(),
    )  # fmt: skip
    is_held_out = np.isin(np.arange(manifests.num_sequences), held)
    if not len(held):
        return DataSplits(manifests, training, None, np.arange(manifests.num_sequences), is_held_out)
    evaluated = functools.partial(planner, imagenet_share=0.0, seed=HELD_OUT_SEED, only=held)
    try:
        evaluation = evaluated()
    except DataError as error:  # what is held out has fewer lengths than what is trained on
        evaluation = evaluated(mode="paper")
        log.warning("held-out sequences are evaluated as with data.mode=paper: %s", error)
    return DataSplits(manifests, training, evaluation, held, is_held_out)


def _drawn(manifests: Manifests, weights: dict[str, float]) -> np.ndarray:
    """(sequences,) bool, those of data sets that are not left out."""
    return np.array([weights.get(name, 1) > 0 for name in manifests.datasets])[manifests.dataset_of]


def _manifests(config: Config, folder: Path, keep: bool) -> list[Path]:
    data = config.data
    paths = [Path(path).expanduser() for path in data.manifests]
    if data.root is not None:
        options = {"min_frames": data.views[0], "single": False}
        paths.append(_folder_manifest("data.root", data.root, folder / "folder.arrow", "folder", options, keep))
    elif not data.manifests:
        paths.append(_scenes_manifest(config, folder / "scenes.arrow"))
    if data.image_root is not None:
        options = {"min_frames": 1, "single": True}
        paths.append(
            _folder_manifest("data.image_root", data.image_root, folder / "images.arrow", "images", options, keep)
        )
    return paths


def _folder_manifest(key: str, root: str, out: Path, dataset: str, options: dict, keep: bool) -> Path:
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"{key} is '{root}', but there is no such folder")
    if keep and _made_from(out, folder, options):
        return out
    try:
        build("folder", folder, out, dataset=dataset, **options)
    except NoSequenceError:
        raise DataError(
            f"{key}: no folder under '{folder}' has {options['min_frames']} images (data.views[0]); "
            "images that are no sequences go into data.image_root"
        ) from None
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    return out


def _made_from(manifest: Path, folder: Path, options: dict) -> bool:
    try:
        about = Manifest.open(manifest).metadata
    except DataError:
        return False
    return (about["source"], about["options"]) == (os.path.abspath(folder), options)


def _scenes_manifest(config: Config, out: Path) -> Path:
    # Rendering needs packages that own data does not.
    from fastmum.data.builders.scenes import rendered
    from fastmum.scenes import ensure_scenes, scene_dirs

    scenes = config.data.scenes
    try:
        root = ensure_scenes(count=scenes.count, views=scenes.views, size=scenes.size, seed=scenes.seed)
        folders = scene_dirs(root, scenes.count)  # there may be more, rendered for another run
        out.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(f"the embedded scenes cannot be rendered: {error}") from error
    records = (rendered(root, folder.name) for folder in folders)
    write_manifest(out, records, dataset="scenes", root=root, metadata={"builder": "scenes", **vars(scenes)})
    return out

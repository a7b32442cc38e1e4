"""Training and held-out data of a run, from its configuration."""

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmum.config.mum import Config
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError, reading
from fastmum.data.manifest import Manifest, Manifests, SequenceRecord, write_manifest
from fastmum.data.plan import StepPlanner

log = logging.getLogger(__name__)

HELD_OUT_SEED = 0  # independent of run.seed: runs of different seeds are evaluated on the same batches


class DataSplits(NamedTuple):
    """Planners of the two splits, and sequences for pictures."""

    manifests: Manifests  # the planners' rows index these
    training: StepPlanner  # draws from all sequences that are not held out
    held_out: StepPlanner | None  # draws from the held-out sequences; None if there are none
    shown: np.ndarray  # (n,) held-out sequences, or those of training if none is held out
    is_held_out: np.ndarray  # (sequences,) bool


def held_out(names: Sequence[str], share: float) -> np.ndarray:
    """Indices of the held-out names, ascending: at least one if `share` > 0 and there are two or more names.

    Names are ordered by their hashes, so that adding sequences does not reshuffle the others.
    """
    count = min(len(names) - 1, max(1, round(share * len(names)))) if share > 0 and names else 0
    by_hash = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    return np.sort(np.array(by_hash[:count], np.int64))


def open_splits(config: Config, folder: Path, resumed: bool = False, micro_batches: int = 1) -> DataSplits:
    """Open the manifests of a run and hold out some of their sequences.

    Manifests of image folders (`data.root`, `data.image_root`) and of the embedded scenes, which are rendered if no
    other data is given, are written to the run's `folder`. If `resumed`, those that the run wrote at its start are
    reused. Held-out sequences are sampled like training sequences, so that the two losses are comparable; single images
    are not held out. `micro_batches` is the number of batches in a training step, on all processes together.

    DataError: missing or empty manifests or folders, scenes that cannot be rendered, settings that cannot be met.
    """
    data = config.data
    manifests = Manifests(_manifests(config, folder / "manifests", resumed))
    lengths = np.diff(manifests.starts)
    used = np.array([data.weights.get(name, 1) > 0 for name in manifests.datasets])[manifests.dataset_of]
    candidates = np.flatnonzero((lengths >= max(2, data.views[0])) & used)
    held = candidates[held_out([manifests.sequence_name(i) for i in candidates.tolist()], data.held_out)]
    views, (scale, aspect) = (data.views[0], data.views[1]), ((p[0], p[1]) for p in (data.crop_scale, data.crop_aspect))
    crops: dict[str, Any] = {"crop_scale": scale, "crop_aspect": aspect, "flip": data.flip}
    fixed = manifests, data.weights, data.frames_per_batch, views
    planner = functools.partial(StepPlanner, *fixed, mode=data.mode, **crops)
    training = planner(imagenet_share=data.imagenet_share, seed=config.run.seed, world_size=micro_batches, exclude=held)
    for note in training.notes:
        log.info("%s", note)
    log.info(
        "training on %d sequences (%d frames), held out: %d (%d frames)",
        len(lengths) - len(held), manifests.num_frames - lengths[held].sum(), len(held), lengths[held].sum(),
    )  # fmt: skip
    is_held_out = np.isin(np.arange(manifests.num_sequences), held)
    if not len(held):
        log.warning("no sequence is held out, so there is no evaluation: data.held_out is %g", data.held_out)
        return DataSplits(manifests, training, None, np.arange(manifests.num_sequences), is_held_out)
    evaluated = functools.partial(planner, imagenet_share=0.0, seed=HELD_OUT_SEED, only=held)
    try:
        evaluation = evaluated()
    except DataError as error:  # the held-out sequences have fewer lengths than those of training
        evaluation = evaluated(mode="paper")
        log.warning("held-out sequences are evaluated as with data.mode=paper: %s", error)
    return DataSplits(manifests, training, evaluation, held, is_held_out)


def _manifests(config: Config, folder: Path, keep: bool) -> list[Path]:
    data = config.data
    paths = [Path(path).expanduser() for path in data.manifests]
    if data.root is not None:
        paths.append(_folder_manifest("data.root", data.root, folder / "folder.arrow", data.views[0], keep))
    elif not data.manifests:
        paths.append(_scenes_manifest(config, folder / "scenes.arrow"))
    if data.image_root is not None:
        paths.append(_folder_manifest("data.image_root", data.image_root, folder / "images.arrow", 1, keep))
    return paths


def _folder_manifest(key: str, root: str, out: Path, min_frames: int, keep: bool) -> Path:
    from fastmum.data.build import NoSequenceError, build  # runs on manifests need no builder

    folder = Path(root).expanduser()
    options: dict[str, Any] = {"min_frames": min_frames, "single": key == "data.image_root"}
    if not folder.is_dir():
        raise DataError(f"{key} is '{root}', but there is no such folder")
    if keep:
        with contextlib.suppress(DataError):
            made = Manifest(out).metadata
            if (made["source"], made["options"]) == (os.path.abspath(folder), options):
                return out
    try:
        build("folder", folder, out, dataset=out.stem, **options)
    except NoSequenceError:
        failed = f"{key}: no folder under '{folder}' has {min_frames} images (data.views[0])"
        raise DataError(f"{failed}; images that are no sequences go into data.image_root") from None
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    return out


def _scenes_manifest(config: Config, out: Path) -> Path:
    from fastmum.scenes import ensure_scenes, scene_dirs  # rendering needs packages that own data does not

    scenes = config.data.scenes
    try:
        root = ensure_scenes(count=scenes.count, views=scenes.views, size=scenes.size, seed=scenes.seed)
        folders = scene_dirs(root, scenes.count)  # there may be more, rendered for another run
        out.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(f"the embedded scenes cannot be rendered: {error}") from error
    records = (rendered_scene(root, folder.name) for folder in folders)
    write_manifest(out, records, dataset="scenes", root=root, metadata={"builder": "scenes", **vars(scenes)})
    return out


def rendered_scene(root: Path, name: str) -> SequenceRecord:
    """All views of a rendered scene, described by `cameras.json` (fastmum/scenes/files.py)."""
    file = root / name / "cameras.json"
    with reading(file, "cameras of a rendered scene", "restore the file or remove its scene"):
        content = json.loads(file.read_text(encoding="utf-8"))
        frames = content["frames"]
        images, depths = ([f"{name}/{frame[key]}" for frame in frames] for key in ("file", "depth"))
        poses = np.array([frame["T_cam_world"] for frame in frames], np.float32).reshape(-1, 4, 4)
        K = np.array([frame["K"] for frame in frames], np.float32).reshape(-1, 9)
        depths = [depth if (root / depth).is_file() else "" for depth in depths]
        format = DepthFormat("png16", unit=float(content["depth_unit"]))  # z in metres, 0 is the sky
        fx_fy_cx_cy = K[:, [0, 4, 2, 5]]
        return SequenceRecord(name, images, poses, fx_fy_cx_cy, depths=depths, depth_format=format)

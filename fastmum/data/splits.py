"""Training and held-out data of a run, from its configuration."""

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastmum.config.mum import Config
from fastmum.config.sources import ScenesSection, SourceSection
from fastmum.data import remote, staging
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError, reading
from fastmum.data.manifest import Manifest, Manifests, SequenceRecord, write_manifest
from fastmum.data.plan import StepPlanner
from fastmum.data.store import StoredPath, is_url
from fastmum.files import expand_user, read_json

log = logging.getLogger(__name__)

HELD_OUT_SEED = 0  # independent of run.seed: runs of different seeds are evaluated on the same batches
MOST_LOOKED_UP = 100_000  # images for whose links the file system is asked
THREADS = 16  # that ask it: network file systems have a high latency


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


def hold_out(
    manifests: Manifests, share: float, least: int = 2, weights: Mapping[str, float] | None = None,
    usable: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Hold out a share of the scenes, as `held_out` does, that have sequences of at least `least` frames.

    Returns the numbers of their sequences of that length (n,), ascending, and whether a sequence is not to be trained
    on (sequences,) bool, which are all of these scenes. Data sets of weight 0 and of single images are not held out.
    Only frames that are `usable` (frames,) bool count; None: all.
    """
    lengths = np.diff(manifests.starts)
    if usable is not None:
        lengths = np.add.reduceat(usable, manifests.starts[:-1], dtype=np.int64)
    long_enough = (lengths >= max(2, least)) & _is_drawn(manifests, weights or {})
    considered = np.flatnonzero(np.isin(manifests.dataset_of, manifests.dataset_of[long_enough]))
    scenes = [*zip(manifests.dataset_of[considered].tolist(), manifests.scene_names(considered), strict=True)]
    names = [*dict.fromkeys(scene for scene, long in zip(scenes, long_enough[considered], strict=True) if long)]
    chosen = {names[i] for i in held_out([name for _, name in names], share)}
    excluded = np.zeros(manifests.num_sequences, bool)
    excluded[considered] = [scene in chosen for scene in scenes]
    return np.flatnonzero(excluded & long_enough), excluded


def _is_drawn(manifests: Manifests, weights: Mapping[str, float]) -> np.ndarray:
    """Whether the data set of a sequence has a weight above 0, (sequences,) bool."""
    return np.array([weights.get(name, 1) > 0 for name in manifests.datasets])[manifests.dataset_of]


class ImageOverlap(NamedTuple):
    """Images that are both held out and trained on."""

    images: int  # that are held out
    shared: int
    example: tuple[Path, Path] | None  # a shared one, as it is named on either side


def image_overlap(
    manifests: Manifests, held: np.ndarray, trained: np.ndarray, most: int = MOST_LOOKED_UP
) -> ImageOverlap:
    """Count the images that sequences `held` and `trained`, each (sequences,) bool, have in common.

    Images are equal if they have the same path, after links in the roots are resolved. If there are at most `most`, in
    ten times as many frames, links below the roots, symbolic or hard, are resolved, too.
    """
    folders: dict[str, int] = {}
    columns = [part.folder_and_file for part in manifests.parts]
    places = []
    for part, (folder, _) in zip(manifests.parts, columns, strict=True):
        root = os.path.realpath(part.root)
        paths = (os.path.normpath(os.path.join(root, name)) for name in folder.dictionary.to_pylist())
        places.append(np.array([folders.setdefault(path, len(folders)) for path in paths], np.int64))
    files = pa.concat_arrays([file.dictionary for _, file in columns]).dictionary_encode()
    width, ends = len(files.dictionary), np.cumsum([len(file.dictionary) for _, file in columns])
    numbers = np.split(files.indices.to_numpy(), ends[:-1])

    def images(sequences: np.ndarray, below: np.ndarray) -> np.ndarray:
        """Numbers of the images of some sequences that are in folders `below` (folders,) bool, each once."""
        found, first = [np.zeros(0, np.int64)], 0
        for part, (folder, file), place, number in zip(manifests.parts, columns, places, numbers, strict=True):
            rows = np.repeat(sequences[first : first + part.num_sequences], np.diff(part.starts))
            rows &= below[place][folder.indices.to_numpy()]
            of_row = place[folder.indices.to_numpy()[rows]] * width + number[file.indices.to_numpy()[rows]]
            found.append(pc.unique(pa.array(of_row)).to_numpy())
            first += part.num_sequences
        return np.unique(np.concatenate(found))

    def path(image: int) -> Path:
        return Path(names[image // width], files.dictionary[image % width].as_py())

    names, everywhere = [*folders], np.ones(len(folders), bool)
    kept = images(held, everywhere)
    near = np.isin(np.arange(len(folders)), kept // width)
    common = np.intersect1d(kept, images(trained, near), assume_unique=True).tolist()
    if common or manifests.num_frames > 10 * most or len(kept) + len(other := images(trained, everywhere)) > most:
        return ImageOverlap(len(kept), len(common), (path(common[0]), path(common[0])) if common else None)
    with ThreadPoolExecutor(THREADS) as pool:
        ours, theirs = (list(map(path, side.tolist())) for side in (kept, other))
        seen = {file: path for file, path in zip(pool.map(_identity, theirs), theirs, strict=True) if file}
        pairs = [(path, seen[file]) for path, file in zip(ours, pool.map(_identity, ours), strict=True) if file in seen]
    return ImageOverlap(len(kept), len(pairs), pairs[0] if pairs else None)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_dev, found.st_ino) if found.st_ino else None


def open_splits(config: Config, folder: Path, resumed: bool = False, micro_batches: int = 1) -> DataSplits:
    """Open the manifests of a run and hold out some of their scenes.

    Manifests of image folders (`data.root`, `data.image_root`) and of the embedded scenes, which are rendered if no
    other data is given, are written to the run's `folder`. If `resumed`, those that the run wrote at its start are
    reused. Held-out sequences are sampled like training sequences, so that the two losses are comparable; single images
    are not held out. `micro_batches` is the number of batches in a training step, on all processes together.

    DataError: missing or empty manifests or folders, scenes that cannot be rendered, settings that cannot be met, or
    images that are held out and trained on.
    """
    data = config.data
    manifests = open_manifests(data, folder, resumed, data.views[0], image_root=data.image_root)
    lengths = np.diff(manifests.starts)
    held, is_held_out = hold_out(manifests, data.held_out, data.views[0], data.weights)
    views, (scale, aspect) = (data.views[0], data.views[1]), ((p[0], p[1]) for p in (data.crop_scale, data.crop_aspect))
    crops: dict[str, Any] = {"crop_scale": scale, "crop_aspect": aspect, "flip": data.flip}
    fixed = manifests, data.weights, data.frames_per_batch, views
    planner = functools.partial(StepPlanner, *fixed, mode=data.mode, **crops)
    drawn: dict[str, Any] = {"imagenet_share": data.imagenet_share, "exclude": np.flatnonzero(is_held_out)}
    training = planner(**drawn, seed=config.run.seed, world_size=micro_batches)
    if not report_split(training.notes, lengths, held, is_held_out, data.held_out):
        return DataSplits(manifests, training, None, np.arange(manifests.num_sequences), is_held_out)
    check_overlap(manifests, is_held_out, data.weights)
    evaluated = functools.partial(planner, imagenet_share=0.0, seed=HELD_OUT_SEED, only=held)
    try:
        evaluation = evaluated()
    except DataError as error:  # the held-out sequences have fewer lengths than those of training
        evaluation = evaluated(mode="paper")
        log.warning("held-out sequences are evaluated as with data.mode=paper: %s", error)
    return DataSplits(manifests, training, evaluation, held, is_held_out)


def report_split(
    notes: Iterable[str], lengths: np.ndarray, held: np.ndarray, is_held_out: np.ndarray, share: float
) -> bool:
    """Log a planner's notes and the sizes of both splits; whether any sequence is held out.

    Args:
        lengths: usable frames of each sequence.
        held, is_held_out: see `hold_out`.
        share: `data.held_out`.
    """
    for note in notes:
        log.info("%s", note)
    drawn = ~is_held_out & (lengths > 0)
    log.info(
        "training on %d sequences (%d frames), held out: %d (%d frames)",
        drawn.sum(), lengths[drawn].sum(), len(held), lengths[held].sum(),
    )  # fmt: skip
    if not len(held):
        why = "all sequences that can be drawn are of one scene" if share else "data.held_out is 0"
        log.warning("no sequence is held out, so there is no evaluation: %s", why)
    return len(held) > 0


def check_overlap(manifests: Manifests, is_held_out: np.ndarray, weights: Mapping[str, float]) -> None:
    """Raise DataError if images of held-out sequences (`is_held_out`, (sequences,) bool) are trained on."""
    found = image_overlap(manifests, is_held_out, ~is_held_out & _is_drawn(manifests, weights))
    if found.example:
        held, trained = found.example
        what = f"'{held}'" if held == trained else f"'{held}', which is '{trained}'"
        both = f"{found.shared} of {found.images} held-out images are also trained on, such as {what}"
        raise DataError(f"{both}: list images once, give their sequences one scene, or set data.held_out=0")


def open_manifests(
    data: SourceSection, folder: Path, keep: bool, least: int = 2, builder: str = "folder",
    image_root: str | None = None,
) -> Manifests:  # fmt: skip
    """Open the manifests of a run, those of folders, or of the embedded scenes if there is nothing else; start staging.

    Manifests that have to be built are written to `manifests` in the run's `folder`, or kept if `keep` and they are of
    the same folder. DataError: missing, damaged or empty ones, or scenes that cannot be rendered.

    Args:
        least: fewest frames of a sequence below `data.root`.
        builder: of sequences below `data.root`.
        image_root: a folder of single images.
    """
    folder = folder / "manifests"
    found: list[Path | str] = [path if is_url(path) else expand_user(path) for path in data.manifests]
    if data.embedded:
        found.append(_scenes_manifest(data.scenes, folder / "scenes.arrow"))
    if data.root is not None:
        options = {"min_frames": least} | ({"single": False} if builder == "folder" else {})
        found.append(_folder_manifest("data.root", data.root, folder / f"{builder}.arrow", builder, options, keep))
    if image_root is not None:
        options = {"min_frames": 1, "single": True}
        found.append(_folder_manifest("data.image_root", image_root, folder / "images.arrow", "folder", options, keep))
    manifests = Manifests(found, data.roots)
    for part in manifests.parts:
        if is_url(part.root):  # an error of credentials or names comes before the run
            first = part.file(0)
            assert isinstance(first, StoredPath)
            assert first.place is not None
            remote.check(first.place.store)
    staging.start(data.stage, data.stage_gb)
    return manifests


def _folder_manifest(key: str, root: str, out: Path, builder: str, options: dict[str, Any], keep: bool) -> Path:
    from fastmum.data.archives import open_root
    from fastmum.data.build import NoSequenceError, build  # runs on manifests need no builder

    folder = expand_user(root)
    if not folder.exists() and open_root(Path(os.path.abspath(folder))) is None:  # nor in an archive
        raise DataError(f"{key} is '{root}', but there is no such folder or archive")
    if keep:
        with contextlib.suppress(DataError):
            made = Manifest(out).metadata
            if made["source"] == os.path.abspath(folder) and made["options"].items() >= options.items():
                return out
    try:
        build(builder, folder, out, dataset=out.stem, **options)
    except NoSequenceError:
        failed = f"{key}: no folder under '{folder}' has {options['min_frames']} images"
        if builder != "folder":
            raise DataError(f"{failed} with depth (data.min_frames)") from None
        raise DataError(f"{failed} (data.views[0]); images that are no sequences go into data.image_root") from None
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    return out


def _scenes_manifest(scenes: ScenesSection, out: Path) -> Path:
    from fastmum.scenes import ensure_scenes, scene_dirs  # rendering needs packages that own data does not

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
        content = read_json(file)
        frames = content["frames"]
        images, depths = ([f"{name}/{frame[key]}" for frame in frames] for key in ("file", "depth"))
        poses = np.array([frame["T_cam_world"] for frame in frames], np.float32).reshape(-1, 4, 4)
        K = np.array([frame["K"] for frame in frames], np.float32).reshape(-1, 9)
        depths = [depth if (root / depth).is_file() else "" for depth in depths]
        format = DepthFormat("png16", unit=float(content["depth_unit"]))  # z in metres, 0 is the sky
        fx_fy_cx_cy = K[:, [0, 4, 2, 5]]
        return SequenceRecord(name, images, poses, fx_fy_cx_cy, depths=depths, depth_format=format)

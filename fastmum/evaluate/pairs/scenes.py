"""The rendered scenes: exact depth and pose for every frame (`fastmum/scenes/`)."""

from __future__ import annotations

import itertools
from pathlib import Path

from fastmum.data.errors import DataError
from fastmum.evaluate.pairs.pair import Pair, PairSet, relative_pose
from fastmum.evaluate.pairs.reading import frame_of, read_json, square
from fastmum.scenes import ensure_scenes, scene_dirs

# Another seed than training's default, so that no model has seen these rooms (`data.scenes.seed`).
SEED = 2025
VIEWS, SIZE = 24, 256
TEST_SCENES, TRAIN_SCENES = 6, 12
# Steps along the path between the views of a pair: 81, 68 and 48 % of the patches are seen in both on average.
GAPS = (2, 4, 8)
STRIDE = 4  # views between the first views of pairs


def embedded(part: str) -> PairSet:
    """Pairs of scenes that nothing was trained on, rendered on the first call.

    Args:
        part: "train", or "test" and "all", which here are the same; they share no scene with "train".
    """
    return from_folders(embedded_folders(part))


def embedded_folders(part: str) -> list[Path]:
    """The folders of those scenes, in the same parts.

    Raises:
        DataError: they cannot be rendered.
    """
    count = TEST_SCENES + (TRAIN_SCENES if part == "train" else 0)
    try:
        root = ensure_scenes(count, VIEWS, SIZE, SEED)
        folders = scene_dirs(root, count)
    except (OSError, RuntimeError) as error:
        raise DataError(f"the embedded scenes cannot be rendered: {error}") from None
    return folders[TEST_SCENES:] if part == "train" else folders


def is_scenes(root: Path) -> bool:
    """Whether a folder holds rendered scenes."""
    return root.is_dir() and any(root.glob("scene_*/cameras.json"))


def from_root(root: Path, part: str) -> PairSet:
    """Pairs of a folder of scenes, as `python -m fastmum.data.scenes --out` writes it.

    Args:
        root: the folder.
        part: "test" is the last third of the scenes, at least one; "train" the others; "all" both.

    Raises:
        DataError: it holds no scene, or one that cannot be read.
    """
    folders = sorted(file.parent for file in root.glob("scene_*/cameras.json"))
    if not folders:
        raise DataError(f"'{root}' holds no rendered scene (scene_*/cameras.json)")
    name = f"{root.resolve().name} (folder)"  # to be told from the embedded scenes
    if part == "all":
        return from_folders(folders, name)
    test = max(1, len(folders) // 3)
    if part == "test":
        return from_folders(folders[-test:], name)
    if len(folders) == 1:
        raise DataError(f"'{root}' holds a single scene, which is tested on; --train-data names what to train on")
    return from_folders(folders[:-test], name)


def from_folders(
    folders: list[Path], name: str = "scenes", gaps: tuple[int, ...] = GAPS, stride: int = STRIDE
) -> PairSet:
    """Pairs of views that lie `gaps` steps apart on their scene's path.

    Args:
        folders: of scenes, in one folder.
        name: of the set.
        gaps: steps between the two views of a pair.
        stride: steps between the first views of two pairs.

    Raises:
        DataError: a scene that cannot be read.
    """
    pairs = [pair for folder in folders for pair in _pairs(folder, gaps, stride)]
    return PairSet(name, pairs, SIZE, origin=str(folders[0].parent.resolve()))


def _pairs(folder: Path, gaps: tuple[int, ...], stride: int) -> list[Pair]:
    file = folder / "cameras.json"
    cameras = read_json(file)
    try:
        unit, entries = float(cameras["depth_unit"]), cameras["frames"]
        poses = [square(entry["T_cam_world"], 4, f"T_cam_world of '{entry['file']}' in '{file}'") for entry in entries]
        frames = [
            frame_of(
                f"{folder.name}/{entry['file']}",
                folder / entry["file"],
                folder / entry["depth"],
                square(entry["K"], 3, f"K of '{entry['file']}' in '{file}'"),
                unit,
            )
            for entry in entries
        ]
    except DataError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"'{file}' is not a scene's cameras.json ({error!r} is missing or wrong)") from None
    places = itertools.chain.from_iterable(((i, i + gap) for i in range(0, len(frames) - gap, stride)) for gap in gaps)
    return [
        Pair(f"{folder.name}/{i:03d}-{j:03d}", folder.name, frames[i], frames[j], relative_pose(poses[i], poses[j]))
        for i, j in places
    ]

"""The rendered scenes: exact depth and pose for every frame (`fastmum/scenes/`)."""

from pathlib import Path

from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError, reading
from fastmum.data.samples import Frame
from fastmum.evaluate.pairs.pair import Pair, PairSet, read_json, rigid, square
from fastmum.scenes import ensure_scenes, scene_dirs

# Neither is the default seed of training (`data.scenes.seed`), so no model has seen these rooms. Scenes that probes
# train on are many and short: with 12 whole paths probes overfit (docs/RESULTS.md).
SIZE = 256
TEST_SEED, TEST_SCENES, TEST_VIEWS = 2025, 12, 24
TRAIN_SEED, TRAIN_SCENES, TRAIN_VIEWS = 2026, 60, 12
# Steps along the path between the views of a pair: 81, 68 and 48 % of the patches are seen in both on average.
GAPS = (2, 4, 8)
STARTS = 6  # pairs of each gap in a scene


def embedded(part: str) -> PairSet:
    """Pairs of scenes that nothing was trained on, rendered on the first call; "test" and "all" are the same."""
    return from_folders(embedded_folders(part))


def embedded_folders(part: str) -> list[Path]:
    """The folders of those scenes; "train" shares none with the others."""
    train = part == "train"
    count, views, seed = (TRAIN_SCENES, TRAIN_VIEWS, TRAIN_SEED) if train else (TEST_SCENES, TEST_VIEWS, TEST_SEED)
    try:
        return scene_dirs(ensure_scenes(count, views, SIZE, seed), count)
    except (OSError, RuntimeError) as error:
        raise DataError(f"the embedded scenes cannot be rendered: {error}") from None


def from_root(root: Path, part: str) -> PairSet:
    """Pairs of a folder of scenes, as `python -m fastmum.data.scenes --out` writes it.

    "test" is the last third of the scenes, at least one; "train" the others; "all" both.
    """
    return from_folders(folders_of(root, part), f"{root.resolve().name} (folder)")  # not the name of the embedded ones


def folders_of(root: Path, part: str) -> list[Path]:
    """The folders of the scenes of a part, see `from_root`; raises `DataError`."""
    folders = sorted(file.parent for file in root.glob("scene_*/cameras.json"))
    if not folders:
        raise DataError(f"'{root}' holds no rendered scene (scene_*/cameras.json)")
    test = max(1, len(folders) // 3)
    if part == "train" and len(folders) == 1:
        raise DataError(f"'{root}' holds a single scene, which is tested on; --train-data names what to train on")
    return {"test": folders[-test:], "train": folders[:-test], "all": folders}[part]


def from_folders(
    folders: list[Path], name: str = "scenes", gaps: tuple[int, ...] = GAPS, starts: int = STARTS
) -> PairSet:
    """Pairs of views `gaps` steps apart on the path of their scene, at most `starts` of each, spread over the path."""
    pairs = []
    for folder in folders:
        frames = frames_of(folder)
        for gap in gaps:
            firsts = max(0, len(frames) - gap)  # views that have another one `gap` steps on
            count = min(starts, firsts)
            for i in (k * firsts // count for k in range(count)):
                pairs.append(Pair(f"{folder.name}/{i:03d}-{i + gap:03d}", folder.name, frames[i], frames[i + gap]))
    return PairSet(name, pairs, SIZE, origin=str(folders[0].parent.resolve()))


def frames_of(folder: Path) -> list[Frame]:
    """The views of a scene along its path; raises `DataError`."""
    file = folder / "cameras.json"
    cameras = read_json(file)
    with reading(file, "the cameras.json of a scene"):
        depth_format = DepthFormat("png16", float(cameras["depth_unit"]))
        frames = []
        for entry in cameras["frames"]:
            name, where = entry["file"], f"of '{entry['file']}' in '{file}'"
            K, pose = square(entry["K"], 3, f"K {where}"), rigid(entry["T_cam_world"], f"T_cam_world {where}")
            frames.append(Frame(f"{folder.name}/{name}", folder / name, K, pose, folder / entry["depth"], depth_format))
        return frames

"""Masked loss of the same frames with more and more other views: does the decoder use them?

Every target frame keeps its mask. It is shown without other views, then with its nearest neighbours in the sequence,
each masked as in training, and, as a control, with as many views of another scene. Only the loss of the target counts
(paper, section 3: every view is masked, there is no reference view).

Legend: F frames of a batch, P patches of a frame, C numbers of views.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmum.data.builders.base import image_folders, images_in
from fastmum.data.errors import DataError
from fastmum.data.samples import Frame
from fastmum.evaluate.features import check_size, load_image, patch_size
from fastmum.evaluate.matching import Result
from fastmum.evaluate.pairs.pair import evenly
from fastmum.evaluate.pairs.scenes import SIZE, embedded_folders
from fastmum.files import expand_user
from fastmum.model.inputs import num_visible, seeded_noise
from fastmum.model.mum import MuM, MuMOutput
from fastmum.progress import progress_bar

log = logging.getLogger(__name__)

CACHED = 256  # decoded pictures kept: two sequences are used at a time


class ViewSequence(NamedTuple):
    """The pictures of one scene, ordered so that neighbours are close in time or space."""

    name: str
    files: list[Path]


class SequenceSet(NamedTuple):
    """Sequences of views to evaluate on."""

    name: str
    sequences: list[ViewSequence]  # at least two
    size: int  # default side of the resized pictures in pixels


def open_sequences(name: str, least: int) -> SequenceSet:
    """The sequences with at least `least` views: "scenes", or a folder, each sub-folder of which is a sequence."""
    if name == "scenes":
        folders, size = embedded_folders("test"), SIZE
        root, title = folders[0].parent, "scenes"
    else:
        root, size = expand_user(name), 224  # of the released training configuration
        if not root.is_dir():
            raise DataError(f"there is no folder '{name}'; a folder or scenes is expected")
        folders, title = [root / folder for folder in image_folders(root)], f"{root.resolve().name} (folder)"
    found = ((folder, [folder / image for image in images_in(folder)]) for folder in folders)
    kept = [ViewSequence(each.relative_to(root).as_posix(), files) for each, files in found if len(files) >= least]
    if short := len(folders) - len(kept):
        log.warning("%d of %d sequences have fewer than %d views and are skipped", short, len(folders), least)
    if len(kept) < 2:
        raise DataError(f"'{name}' has {len(kept)} sequences of at least {least} views, but two are needed")
    return SequenceSet(title, kept, size)


@dataclass(frozen=True)
class ViewSettings:
    """Choice of the other views; a value out of range is a ValueError that starts with the field."""

    counts: tuple[int, ...] = (1, 2, 4, 8)  # numbers of views, ascending from 1
    mask_ratio: float = 0.75  # of every frame, as in training
    gap: int = 1  # steps along the sequence between neighbours
    stride: int = 4  # steps along the sequence between targets
    masks: int = 4  # masks drawn for every target
    seed: int = 0  # of the masks

    def __post_init__(self) -> None:
        if len(self.counts) < 2 or self.counts[0] != 1 or list(self.counts) != sorted(set(self.counts)):
            raise ValueError(f"counts are {self.counts}, but must start with 1 and increase")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}, but must lie between 0 and 1")
        for name in ("gap", "stride", "masks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")

    @property
    def least(self) -> int:
        """Views that a sequence must have."""
        return (self.counts[-1] - 1) * self.gap + 1


class Target(NamedTuple):
    """A frame and its other views, as indices of sequences and of frames in them."""

    sequence: int
    frame: int
    near: list[int]  # neighbours in the sequence, nearest first
    other: int  # sequence of the unrelated views
    far: list[int]  # unrelated views, as far from each other as `near`


def targets(sequences: SequenceSet, settings: ViewSettings) -> list[Target]:
    """All targets of a set. Unrelated views are from the sequence half the set away, because near ones may be alike."""
    found, count = [], settings.counts[-1] - 1
    for i, views in enumerate(sequences.sequences):
        other = (i + max(1, len(sequences.sequences) // 2)) % len(sequences.sequences)
        length = len(sequences.sequences[other].files)
        for frame in range(0, len(views.files), settings.stride):
            near = _neighbours(frame, len(views.files), count, settings.gap)
            start = min(frame, length - 1)
            far = [start, *_neighbours(start, length, count, settings.gap)][:count]
            if len(near) == len(far) == count:
                found.append(Target(i, frame, near, other, far))
    return found


def _neighbours(frame: int, length: int, count: int, gap: int) -> list[int]:
    """The nearest frames in steps of the gap; of two equally near ones, the later one first."""
    reachable = [other for other in range(frame % gap, length, gap) if other != frame]
    return sorted(reachable, key=lambda other: (abs(other - frame), -other))[:count]


class ViewBatch(NamedTuple):
    """A target only, then with each number of neighbours, then with each number of unrelated views."""

    frames: Tensor  # (F, size, size, 3) uint8, the target first in every sequence
    lengths: list[int]  # views of each sequence
    noise: Tensor  # (F, P) of the masks; a frame has the same noise in every sequence

    @property
    def firsts(self) -> Tensor:
        """(n,) int64, index of the target in each sequence."""
        lengths = torch.tensor(self.lengths)
        return lengths.cumsum(0) - lengths


def _load(file: Path, size: int) -> Tensor:
    return load_image(Frame(str(file), file), size)


def target_batch(
    sequences: SequenceSet, target: Target, settings: ViewSettings, size: int, patches: int, mask: int = 0,
    load: Callable[[Path, int], Tensor] = _load,
) -> ViewBatch:  # fmt: skip
    """The batch of a target under its mask number `mask`; `load` reads a picture at a size."""
    related = [(target.sequence, frame) for frame in (target.frame, *target.near)]
    unrelated = [related[0], *((target.other, frame) for frame in target.far)]
    rows = [related[:count] for count in settings.counts] + [unrelated[:count] for count in settings.counts[1:]]
    flat = [view for row in rows for view in row]
    frames = torch.stack([load(sequences.sequences[i].files[frame], size) for i, frame in flat])
    noise = [seeded_noise(settings.seed, i, mask * 1_000_000 + frame, 1, patches)[0] for i, frame in flat]
    return ViewBatch(frames, [len(row) for row in rows], torch.stack(noise))


@torch.no_grad()
def reconstruct(model: MuM, batch: ViewBatch, mask_ratio: float) -> MuMOutput:
    """The model's output for a batch; the loss is (F,), one value for each frame."""
    device = next(model.parameters()).device
    return model(batch.frames.to(device), batch.lengths, mask_ratio, batch.noise.to(device), reduction="none")


def evaluate_views(
    model: nn.Module, sequences: SequenceSet, settings: ViewSettings | None = None, size: int | None = None,
    most: int | None = None,
) -> Result:  # fmt: skip
    """The masked loss of a `MuM` on targets without other views, with neighbours, and with views of another scene.

    At most `most` targets, evenly spread over the set, are measured. The result has "same" and "other", the mean loss
    by number of views (mean over targets and masks, then over sequences), with neighbours and with unrelated views;
    "change_same" and "change_other", [mean, standard error over sequences] of the difference to one view;
    "per_sequence"; "scores", those of "same" as "views_2" and so on.

    DataError: no decoder, sequences that are too short, an unreadable picture, or a loss that is not finite.
    """
    if not isinstance(model, MuM):
        raise DataError("the decoder predicts masked patches, but these weights have only an encoder")
    settings = settings or ViewSettings()
    size = check_size(model, size or sequences.size)
    patches = (size // patch_size(model)) ** 2
    try:
        num_visible(patches, settings.mask_ratio)
    except ValueError as error:
        raise DataError(str(error)) from None
    found = evenly(targets(sequences, settings), most)
    if not found:
        raise DataError(f"no sequence of '{sequences.name}' has {settings.least} views, {settings.gap} apart")
    load = functools.lru_cache(maxsize=CACHED)(_load)
    losses: dict[str, list[Tensor]] = {}
    for target in progress_bar(found, desc="masked loss", unit="target", leave=False):
        for mask in range(settings.masks):
            batch = target_batch(sequences, target, settings, size, patches, mask, load)
            loss = reconstruct(model, batch, settings.mask_ratio).loss.cpu()[batch.firsts]
            if not loss.isfinite().all():
                raise DataError("the masked loss is not finite: are the weights damaged?")
            losses.setdefault(sequences.sequences[target.sequence].name, []).append(loss)
    numbers = _numbers({name: torch.stack(rows).double().mean(0) for name, rows in losses.items()}, settings.counts)
    numbers["settings"] = {"size": size, "targets": len(found), **asdict(settings)}
    return Result(numbers, None, size, found)


def _numbers(by_sequence: dict[str, Tensor], counts: tuple[int, ...]) -> dict[str, Any]:
    """From the losses (2 C - 1,) of each sequence: one view, C - 1 times neighbours, C - 1 times unrelated views."""
    losses = torch.stack(list(by_sequence.values()))
    columns = list(range(2 * len(counts) - 1))
    rows = {"same": losses[:, : len(counts)], "other": losses[:, [0, *columns[len(counts) :]]]}
    means = {name: each.mean(0).tolist() for name, each in rows.items()}
    scores = {f"views_{count}": loss for count, loss in zip(counts, means["same"], strict=True)}
    numbers = {"scores": scores, "views": list(counts), **means}
    for name, each in rows.items():
        change = each - each[:, :1]
        errors = (change.std(0) / len(each) ** 0.5).tolist() if len(each) > 1 else [None] * len(counts)
        numbers[f"change_{name}"] = [list(pair) for pair in zip(change.mean(0).tolist(), errors, strict=True)]
    numbers["per_sequence"] = {
        sequence: {name: each[i].tolist() for name, each in rows.items()} for i, sequence in enumerate(by_sequence)
    }
    return numbers

"""Masked loss of the same frames with more and more views beside them: does the decoder use the other views?

Every target frame keeps its mask. It is shown alone, then with its nearest neighbours on the path, each masked as in
training, and, to tell geometry from company, with as many views of another scene. Nothing but the loss on the target
counts (paper, section 3: every view is masked, there is no reference view).

Legend: F frames of a batch, P patches of a frame, N targets, C numbers of views.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastmum.data.errors import DataError
from fastmum.data.samples import read_rgb
from fastmum.evaluate.features import check_size, patch_size, squared
from fastmum.evaluate.pairs.pair import evenly
from fastmum.evaluate.result import Result
from fastmum.evaluate.sequences import SequenceSet
from fastmum.model.masking import num_visible, seeded_noise
from fastmum.model.mum import MuM, MuMOutput

Load = Callable[[Path, int], Tensor]
CACHED = 256  # decoded pictures kept: those of two sequences are wanted at a time


@dataclass(frozen=True)
class ViewSettings:
    """How the other views are chosen.

    Args:
        counts: numbers of views, ascending from 1.
        mask_ratio: of every frame, as in training.
        gap: steps along the sequence between neighbours.
        stride: steps along the sequence between targets.
        masks: times that every target is masked anew.
        seed: of the masks.

    Raises:
        ValueError: a value that cannot be.
    """

    counts: tuple[int, ...] = (1, 2, 4, 8)
    mask_ratio: float = 0.75
    gap: int = 1
    stride: int = 4
    masks: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.counts) < 2 or self.counts[0] != 1 or list(self.counts) != sorted(set(self.counts)):
            raise ValueError(f"counts are {self.counts}, but must begin with 1 and rise")
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
    """A frame and what is shown beside it, all by place in their sequences.

    Args:
        sequence, frame: the target.
        near: its neighbours, nearest first.
        other: the sequence of the unrelated views.
        far: their places, as far from each other as the neighbours.
    """

    sequence: int
    frame: int
    near: list[int]
    other: int
    far: list[int]


def targets(sequences: SequenceSet, settings: ViewSettings) -> list[Target]:
    """All targets of a set; the unrelated views are of the sequence half the set away, past rooms seen twice."""
    found, count = [], settings.counts[-1] - 1
    for i, views in enumerate(sequences.sequences):
        other = (i + max(1, len(sequences.sequences) // 2)) % len(sequences.sequences)
        for frame in range(0, len(views.files), settings.stride):
            near = _neighbours(frame, len(views.files), count, settings.gap)
            start = min(frame, len(sequences.sequences[other].files) - 1)
            far = [start, *_neighbours(start, len(sequences.sequences[other].files), count, settings.gap)][:count]
            if len(near) == len(far) == count:
                found.append(Target(i, frame, near, other, far))
    return found


def some_targets(sequences: SequenceSet, settings: ViewSettings, most: int | None) -> list[Target]:
    """At most `most` targets, evenly spread over the set; None for all.

    Raises:
        DataError: there are none.
    """
    found = targets(sequences, settings)
    if not found:
        raise DataError(f"no sequence of '{sequences.name}' has {settings.least} views, {settings.gap} apart")
    return evenly(found, most)


def _neighbours(frame: int, length: int, count: int, gap: int) -> list[int]:
    """The nearest places in steps of the gap, of two equally near the later one first."""
    reachable = [place for place in range(frame % gap, length, gap) if place != frame]
    return sorted(reachable, key=lambda place: (abs(place - frame), -place))[:count]


def _load(file: Path, size: int) -> Tensor:
    return squared(read_rgb(file), size)


class Shown(NamedTuple):
    """A target's batch: alone, with each number of neighbours, and with each number of unrelated views.

    Args:
        frames: (F, size, size, 3) uint8, the target first in every sequence.
        lengths: views of each sequence.
        noise: (F, P) of the masks; a frame has the same wherever it stands.
    """

    frames: Tensor
    lengths: list[int]
    noise: Tensor

    @property
    def firsts(self) -> Tensor:
        """(n,) int64, where the target stands in each sequence."""
        lengths = torch.tensor(self.lengths)
        return lengths.cumsum(0) - lengths


def shown(
    sequences: SequenceSet,
    target: Target,
    settings: ViewSettings,
    size: int,
    patches: int,
    mask: int = 0,
    load: Load = _load,
) -> Shown:
    """The batch of a target under its mask of that number; `load` reads a picture at a size."""
    own, other = (sequences.sequences[i].files for i in (target.sequence, target.other))
    related = [(target.sequence, own, place) for place in (target.frame, *target.near)]
    unrelated = [related[0], *((target.other, other, place) for place in target.far)]
    rows = [row for row in (related, unrelated) for row in _growing(row, settings.counts, alone=row is related)]
    flat = [view for row in rows for view in row]
    noise = [_noise(settings.seed, mask, sequence, place, patches) for sequence, _, place in flat]
    frames = [load(files[place], size) for _, files, place in flat]
    return Shown(torch.stack(frames), [len(row) for row in rows], torch.stack(noise))


def _growing(row: list, counts: tuple[int, ...], alone: bool) -> Iterator[list]:
    return (row[:count] for count in counts if count > 1 or alone)


def _noise(seed: int, mask: int, sequence: int, place: int, patches: int) -> Tensor:
    return seeded_noise(seed, sequence, mask * 1_000_000 + place, 1, patches)[0]


@torch.no_grad()
def reconstruct(model: MuM, batch: Shown, mask_ratio: float) -> MuMOutput:
    """What the model makes of a target's batch; the loss is (F,), one of each frame."""
    device = next(model.parameters()).device
    return model(batch.frames.to(device), batch.lengths, mask_ratio, batch.noise.to(device), reduction="none")


def evaluate_views(
    model: nn.Module,
    sequences: SequenceSet,
    settings: ViewSettings | None = None,
    size: int | None = None,
    most: int | None = None,
    progress: bool = True,
) -> Result:
    """The masked loss of targets, alone, with neighbours, and with views of another scene.

    Args:
        model: a `MuM` in eval mode, on the device that everything is computed on.
        sequences: to test on.
        settings: see there; None: the defaults.
        size: side of the pictures in pixels; None: the set's own.
        most: at most so many targets, spread over the set; None: all.
        progress: whether to show a bar.

    Returns:
        "same" and "other", the mean loss by number of views (mean over targets and masks, then over sequences), with
        neighbours and with unrelated views; "change_same" and "change_other", [mean, standard error over sequences] of
        the difference to the target alone; "per_sequence"; "scores", those of "same" as "views_2" and so on.

    Raises:
        DataError: an encoder without decoder, sequences that are too short, a picture that cannot be read, or a loss
            that is not finite.
    """
    if not isinstance(model, MuM):
        raise DataError("masked frames are predicted by the decoder, but these weights are an encoder's alone")
    settings = settings or ViewSettings()
    size = check_size(model, size or sequences.size)
    patches = (size // patch_size(model)) ** 2
    try:
        num_visible(patches, settings.mask_ratio)
    except ValueError as error:
        raise DataError(str(error)) from None
    found, load = some_targets(sequences, settings, most), functools.lru_cache(maxsize=CACHED)(_load)
    losses: dict[str, list[Tensor]] = {}
    for target in tqdm(found, desc="masked loss", unit="target", disable=not progress, leave=False):
        for mask in range(settings.masks):
            batch = shown(sequences, target, settings, size, patches, mask, load)
            loss = reconstruct(model, batch, settings.mask_ratio).loss.cpu()[batch.firsts]
            losses.setdefault(sequences.sequences[target.sequence].name, []).append(loss)
    numbers = _numbers({name: torch.stack(rows).double().mean(0) for name, rows in losses.items()}, settings.counts)
    if not all(torch.isfinite(loss).all() for rows in losses.values() for loss in rows):
        raise DataError("the masked loss is not finite: are the weights whole?")
    about = {"size": size, "targets": len(found), **asdict(settings)}
    return Result(numbers | {"settings": about}, None, size)


def _numbers(by_sequence: dict[str, Tensor], counts: tuple[int, ...]) -> dict[str, Any]:
    """From the losses (2 C - 1,) of each sequence: alone, with neighbours, with unrelated views."""
    losses = torch.stack(list(by_sequence.values()))
    same = losses[:, : len(counts)]
    other = torch.cat([losses[:, :1], losses[:, len(counts) :]], 1)
    return {
        "scores": {f"views_{count}": loss for count, loss in zip(counts, same.mean(0).tolist(), strict=True)},
        "views": list(counts),
        "same": same.mean(0).tolist(),
        "other": other.mean(0).tolist(),
        "change_same": _change(same),
        "change_other": _change(other),
        "per_sequence": {
            name: {"same": a, "other": b} for name, a, b in zip(by_sequence, same.tolist(), other.tolist(), strict=True)
        },
    }


def _change(losses: Tensor) -> list[list[float | None]]:
    """[mean, standard error over sequences] of the difference to the first column; one sequence has no error."""
    difference = losses - losses[:, :1]
    means = difference.mean(0).tolist()
    if len(losses) == 1:
        return [[mean, None] for mean in means]
    errors = (difference.std(0) / len(losses) ** 0.5).tolist()
    return [list(pair) for pair in zip(means, errors, strict=True)]

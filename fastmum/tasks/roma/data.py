"""Pairs as RoMa trains on them: scenes listed by two least overlaps, weighted by their size, shifted and flipped."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastmum.config.schema import ConfigError, key
from fastmum.data.colour import NOTHING
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests
from fastmum.data.pair_loader import PairLoader, square_view
from fastmum.data.pair_plan import PairPlanner
from fastmum.data.samples import manifest_frame
from fastmum.geometry import View, crop_resize
from fastmum.geometry.crop import flip
from fastmum.model.inputs import IMAGENET_MEAN
from fastmum.tasks.pairs import PairDataSection

LISTED = 100_000  # pairs of a list, at most
POWER = 0.75  # a pair of a list of n has the weight n^-POWER
ROUND = 25_000  # pairs that are drawn without replacement
PAPER_SIDE = 560  # pixels, of which the shift is 32
FILL = tuple(round(255 * x) for x in IMAGENET_MEAN)  # colour of what a shift uncovers: 0 after normalisation
SHIFT_SEED, ROUND_SEED = 1, 2


@dataclass
class RomaDataSection(PairDataSection):
    """Pairs of frames with cameras and depth, and their sampling (Parskatt/RoMa's training)."""

    sampling: str = key("overlap", "overlap: pairs by overlap, from depth", choices=("overlap",))
    overlap: list[float] = key(
        [0.01, 1.0], "least and most share of a frame that the other sees", least=0, most=1, length=2
    )
    second_overlap: float = key(0.35, "pairs of at least this overlap are listed a second time", least=0, most=1)
    pairs_per_batch: int = key(8, "pairs that a device computes at once", least=1)
    image_size: int = key(PAPER_SIDE, "side of a frame in pixels; the aspect ratio is not kept", least=16)
    shift: int = key(32, "largest shift of both images of a pair, pixels along either axis", least=0)
    flip: bool = key(True, "mirror both images of every second pair")

    def check(self, patch_size: int) -> None:
        super().check(patch_size)
        if self.image_size % 8:
            raise ConfigError(f"data.image_size is {self.image_size}, but must be a multiple of 8")
        if self.shift >= self.image_size:
            raise ConfigError(f"data.shift is {self.shift}, but must be below data.image_size ({self.image_size})")


class RomaPlan(NamedTuple):
    """As `PairPlan`, with a shift and a flip for every pair."""

    rows: np.ndarray  # (2 B,) int64
    lengths: np.ndarray  # (B,) int64, all 2
    size: tuple[int, int]
    jitter: np.ndarray  # (2 B, JITTER_WIDTH), which changes nothing
    shift: np.ndarray  # (B, 2) int64, pixels to the right and down
    flip: np.ndarray  # (B,) bool


class RomaPlanner(PairPlanner):
    """Rounds of pairs without replacement: each scene is a list of pairs, and of those of a larger overlap another one.

    Arguments and errors as of `PairPlanner`; `augment` is for shifts and flips, there are no random colours.
    """

    def __init__(
        self, manifests: Manifests, weights: Any = None, pairs_per_batch: int = 8, *args: Any,
        second_overlap: float = 0.35, shift: int = 32, flip: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(manifests, weights, pairs_per_batch, *args, **options)
        self._shift, self._flip = shift, flip
        sequence_of = np.repeat(np.arange(manifests.num_sequences), np.diff(manifests.starts))
        names = manifests.scene_names(np.arange(manifests.num_sequences))
        scenes = np.unique(np.array([f"{d}\0{name}" for d, name in zip(manifests.dataset_of, names, strict=True)]),
                           return_inverse=True)[1]  # fmt: skip
        rng = np.random.default_rng(self.seed)
        rows, chances = [np.zeros((0, 2), np.int64)], [np.zeros(0)]
        for dataset, pairs in enumerate(self.pairs):
            weight = (weights or {}).get(manifests.datasets[dataset], 1.0)
            if not weight or not len(pairs):
                continue
            listed, overlap = pairs.rows, pairs.overlap  # type: ignore[attr-defined]
            scene_of = scenes[sequence_of[listed[:, 0]]]
            order = np.argsort(scene_of, kind="stable")
            for scene in np.split(order, np.flatnonzero(np.diff(scene_of[order])) + 1):
                for some in (scene, scene[overlap[scene] >= second_overlap]):
                    some = some if len(some) <= LISTED else rng.choice(some, LISTED, replace=False)
                    rows.append(listed[some])
                    chances.append(np.full(len(some), weight * max(len(some), 1) ** -POWER))
        self._rows, self._weights = np.concatenate(rows), np.concatenate(chances)
        if not len(self._rows):
            raise DataError("there is no pair with depth on both sides to draw; lower data.overlap")
        self._round = lru_cache(2)(self._draw_round)

    def _draw_round(self, number: int) -> np.ndarray:
        """Indices of the pairs of a round in order, without replacement: by exponential times over weights."""
        rng, count = np.random.default_rng((self.seed, ROUND_SEED, number)), min(ROUND, len(self._rows))
        times = rng.standard_exponential(len(self._rows)) / self._weights
        first = np.argpartition(times, count - 1)[:count]
        return first[np.argsort(times[first])]

    def draw(self, step: int, rank: int, rng: np.random.Generator) -> np.ndarray:
        length, count = min(ROUND, len(self._rows)), self.pairs_per_batch
        numbers = (step * self.world_size + rank) * count + np.arange(count)
        found = [self._rows[self._round(n // length)[n % length]] for n in numbers.tolist()]
        return np.stack([pair[:: rng.choice((1, -1))] for pair in found])

    def plan(self, step: int, rank: int = 0) -> RomaPlan:  # type: ignore[override]
        """The plan of a rank for a step."""
        rows, lengths, size, _ = super().plan(step, rank)
        rng, B = np.random.default_rng((self.seed, step, rank, SHIFT_SEED)), len(lengths)
        shift, flipped = rng.integers(-self._shift, self._shift + 1, (B, 2)), rng.random(B) < 0.5
        if not self.augment:
            shift, flipped = 0 * shift, flipped & False
        return RomaPlan(rows, lengths, size, np.tile(NOTHING, (len(rows), 1)), shift, flipped & self._flip)


class RomaLoader(PairLoader):
    """Loads plans of `RomaPlanner`; arguments as of `PairLoader`."""

    def _read(self, plan: RomaPlan, place: int, row: int) -> View:  # type: ignore[override]
        shift, flipped = plan.shift[place // 2], plan.flip[place // 2]
        view = manifest_frame(self.manifests, row).view(lambda whole: square_view(whole, plan.size))
        view = shifted(replace(view, mask=None), int(shift[0]), int(shift[1]))
        return flip(view) if flipped else view


def shifted(view: View, right: int, down: int) -> View:
    """Move the content by pixels; what comes in from outside is of the mean colour, and of unknown depth."""
    if not right and not down:
        return view
    width, height = view.size
    moved = crop_resize(view, (-right, -down, width - right, height - down))
    outside = np.ones((height, width), bool)
    outside[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = False
    image = moved.image.copy()
    image[outside] = FILL
    return replace(moved, image=image)

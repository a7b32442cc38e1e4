"""Sampling on 20 M frames in twelve data sets, at 1 to 256 ranks: time of a plan, and speed-up by full batches.

The speed-up is simulated: a synchronous step takes as long as its costliest rank, and a rank's time is proportional to
the operations of its products. The plans of both are the real ones; the time of a step is not measured.
"""

from __future__ import annotations

from itertools import count
from time import perf_counter

import numpy as np
import pytest

from benchmarks.duel import Duel, interleave
from benchmarks.reference.sampler import PaperSampler, Sequences
from benchmarks.results import FASTMUM, FRAMES_A_SECOND, REFERENCE
from fastmum import PRESETS
from fastmum.data.packing import fill_rank
from fastmum.data.plan import MODES, Catalogue, StepPlanner
from fastmum.data.plan_table import draw, operations

RANKS = (1, 8, 64, 256)
PLANNED = 64  # ranks of every mode; one mode also runs the others
OTHERS = tuple(ranks for ranks in RANKS if ranks != PLANNED)
RATE = 1e12  # FLOP/s of a rank in the simulation
SEEDS, STEPS = 4, 40  # of the simulation
PLANS = 16  # per round, since plans differ in their cost


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    """302 k sequences of 24 to 100 frames in eleven data sets, and 1.28 M single images."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(24, 101, 302_000), np.ones(1_280_000, np.int64)])
    dataset_of = np.repeat(np.arange(12), [*[27_454] * 10, 27_460, 1_280_000]).astype(np.int16)
    starts = np.concatenate([[0], lengths.cumsum()])
    assert 19e6 < starts[-1] < 21e6
    return Catalogue((*"abcdefghijk", "images"), starts, dataset_of)


def paper_sampler(catalogue: Catalogue, seed: int, batches: int) -> PaperSampler:
    """The reference's sampler of one rank."""
    datasets = []
    for number in range(len(catalogue.datasets) - 1):
        of_set = np.flatnonzero(catalogue.dataset_of == number)
        starts, ends = catalogue.starts[of_set], catalogue.starts[of_set + 1]
        datasets.append(Sequences(starts.tolist(), (ends - starts).tolist()))
    first_image = int(catalogue.starts[np.flatnonzero(catalogue.dataset_of == number + 1)[0]])
    return PaperSampler(datasets, range(first_image, int(catalogue.starts[-1])), batches, seed=seed)


@pytest.mark.parametrize(("mode", "ranks"), [*((mode, PLANNED) for mode in MODES), *(("balanced", n) for n in OTHERS)])
def test_plan(duel: Duel, catalogue: Catalogue, mode: str, ranks: int) -> None:
    """Plans of the last rank: lengths, data sets, sequences, frames; fastmum's also draw crops and flips."""
    sampler, steps = paper_sampler(catalogue, 0, 10**9), count()
    planner, batches = StepPlanner(catalogue, mode=mode, world_size=ranks), iter(sampler)

    def theirs() -> None:
        for _ in range(PLANS):
            assert 0 < sum(map(len, next(batches))) <= 96

    def ours() -> None:
        for _ in range(PLANS):
            assert 0 < len(planner.plan(next(steps), ranks - 1).rows) <= 96

    times = interleave({REFERENCE: theirs, FASTMUM: ours}, 8)
    each = {name: [seconds / PLANS for seconds in values] for name, values in times.items()}
    duel.record("sampler", f"plan of a rank's step, {mode}, {_of(ranks)}", each)


def test_planner(duel: Duel, catalogue: Catalogue) -> None:
    """Setting up: lists of sequences for the reference; sorting them, and simulating the pool, for fastmum."""

    def ours() -> None:
        fill_rank.cache_clear()
        StepPlanner(catalogue, mode="balanced", world_size=64)

    duel.record("sampler", "set-up", interleave({REFERENCE: lambda: paper_sampler(catalogue, 0, 1), FASTMUM: ours}, 4))


@pytest.mark.parametrize("mode", ["packed", "balanced"])
def test_frames_per_second(duel: Duel, catalogue: Catalogue, quick: bool, mode: str) -> None:
    """All ranks together, each with `RATE` operations a second; every round has another seed."""
    (frame, pair), most = operations(PRESETS["mum_vitl16"]), max(RANKS)
    seeds, steps = (2, 8) if quick else (SEEDS, STEPS)
    speeds: dict[int, dict[str, list[float]]] = {ranks: {REFERENCE: [], FASTMUM: []} for ranks in RANKS}
    seconds: dict[str, list[float]] = {REFERENCE: [], FASTMUM: []}

    def note(name: str, began: float, frames: np.ndarray, squares: np.ndarray) -> None:
        seconds[name].append(perf_counter() - began)
        for ranks in RANKS:
            f, s = frames[:, :ranks], squares[:, :ranks]
            slowest = (f * frame + s * pair).max(axis=1).sum()
            speeds[ranks][name].append(float(RATE * f.sum() / slowest))

    for seed in range(seeds):
        began = perf_counter()
        samplers = [PaperSampler((), (), steps, seed=seed * most + rank) for rank in range(most)]
        shapes = np.array([[sampler.shape() for sampler in samplers] for _ in range(steps)])
        note(REFERENCE, began, shapes.prod(axis=2), shapes[..., 0] * shapes[..., 1] ** 2)
        began = perf_counter()
        note(FASTMUM, began, *draw(StepPlanner(catalogue, mode=mode, seed=seed, world_size=most), steps))
    for ranks in RANKS:
        what = f"{_of(ranks)}, {mode}, frames/s at 1 TFLOP/s each (simulated)"
        duel.record("sampler", what, speeds[ranks], unit=FRAMES_A_SECOND, seconds=seconds)


def _of(ranks: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''}"

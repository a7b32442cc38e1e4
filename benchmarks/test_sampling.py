"""How long a rank takes to plan a step, on 20 M frames in twelve data sets."""

from dataclasses import dataclass
from itertools import count

import numpy as np
import pytest

from fastmum.data.plan import MODES, StepPlanner


@dataclass(frozen=True)
class Catalogue:
    """What the sampler reads of manifests."""

    datasets: tuple[str, ...]
    starts: np.ndarray
    dataset_of: np.ndarray


@pytest.fixture(scope="module")
def catalogue():
    """302 k sequences of 24 to 100 frames in eleven data sets, and 1.28 M single images."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(24, 101, 302_000), np.ones(1_280_000, np.int64)])
    dataset_of = np.repeat(np.arange(12), [*[27_454] * 10, 27_460, 1_280_000]).astype(np.int16)
    starts = np.concatenate([[0], lengths.cumsum()])
    assert 19e6 < starts[-1] < 21e6
    return Catalogue(tuple("abcdefghijk") + ("images",), starts, dataset_of)


@pytest.mark.parametrize("ranks", [8, 64, 256])
@pytest.mark.parametrize("mode", MODES)
def test_plan(benchmark, catalogue, mode, ranks):
    """The whole plan of one rank: lengths, data sets, sequences, frames, crops and flips."""
    planner, steps = StepPlanner(catalogue, mode=mode, world_size=ranks), count()
    benchmark(lambda: planner.plan(next(steps), ranks - 1))


@pytest.mark.parametrize("mode", MODES)
def test_planner(benchmark, catalogue, mode):
    """Setting up: sorting the sequences, and fitting the lengths."""
    benchmark(lambda: StepPlanner(catalogue, mode=mode, world_size=64))

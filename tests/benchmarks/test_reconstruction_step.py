"""The benchmark of reconstruction's step: its arguments and its prediction."""

import pytest

from benchmarks.offline.reconstruction import PAPER_SECONDS, seconds, work
from benchmarks.reconstruction import main
from fastmum.model.config import PRESETS
from fastmum.tasks.reconstruction.model import ReconstructionConfig


def test_invalid_arguments(refusal):
    assert "--frames is 5" in refusal(main, "--frames=5", "--views=2")


@pytest.mark.slow
def test_the_prediction_counts_what_the_task_counts():
    config = ReconstructionConfig(pairs=4, taps=(0, 1, 2, 3), dpt_features=64, dpt_levels=(64, 64, 64, 64))
    kept, recomputed = (work(config, PRESETS["mum_vitb16"], again) for again in (False, True))
    assert recomputed.products > kept.products
    assert recomputed.convolutions == kept.convolutions
    low, likely, high = seconds(kept)
    assert 0 < low < likely < high
    assert pytest.approx(2.592) == PAPER_SECONDS
